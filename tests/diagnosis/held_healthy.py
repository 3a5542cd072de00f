"""Healthy runs that the authors of the detectors did not see: each would alarm some simple rule.

Labels come from training alone, in plain torch. On seeds 0 to 9 the median loss of the last tenth is below
0.9 of that of the first ten steps (or within 5 % of it, where it "stays"), losses and weights are always
finite, and with a rate ten times lower, tried on some of these seeds, the loss does not end much lower.
Of the actor and critic, whose loss says little, the reward was looked at: it rises from 0.25 to above 0.9.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.diagnosis.runs import Batch, Setup
from tests.diagnosis.suite import (
    Recurrent,
    Residual,
    Transformer,
    adam,
    blobs,
    case,
    cross_entropy,
    images,
    markov,
    mlp,
    moons,
    sampler,
    sgd,
    squared_error,
    teacher,
)

Draw = Callable[[int], Batch]


class Clock:
    """Tells a loss at which step it is: wraps what draws the batches."""

    def __init__(self, draw: Draw) -> None:
        self.draw, self.step = draw, 0

    def __call__(self, step: int) -> Batch:
        self.step = step
        return self.draw(step)


def adamw(model: nn.Module, lr: float, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, **options)


def multiplied(optimizer: torch.optim.Optimizer, factor: Callable[[int], float]) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train(setup: Setup) -> None:
    """What came before the run that is watched."""
    for step in range(setup.steps):
        x, y = setup.batch(step)
        setup.optimizer.zero_grad()
        torch.autograd.backward(setup.loss(setup.model, x, y))
        setup.optimizer.step()
    setup.optimizer.zero_grad()


# Losses of unusual size, noise or sign


@case(split="held", slow=True)
def healthy_stream_of_heavy_tails() -> Setup:
    """One sample at a time, with noise of heavy tails: some losses are a thousand times the usual."""
    model = mlp((8, 16, 1), nn.Tanh)
    draw = sampler(*teacher(2000), 1)
    noise = torch.distributions.StudentT(2.5)

    def batch(step: int) -> Batch:
        x, y = draw(step)
        return x, y + 0.15 * noise.sample(y.shape)

    return Setup(model, sgd(model, 0.003), batch, squared_error, 6000)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.up1 = self.layer(1, 8), self.layer(16, 8)
        self.down2, self.up2 = self.layer(8, 16), self.layer(32, 8)
        self.bottom, self.pool = self.layer(16, 16), nn.MaxPool2d(2)
        self.head = nn.Conv2d(8, 1, 1)

    def layer(self, inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down1(x)
        coarse = self.down2(self.pool(fine))
        bottom = self.bottom(self.pool(coarse))
        up = self.up2(torch.cat([coarse, F.interpolate(bottom, scale_factor=2.0)], 1))
        out: Tensor = self.head(self.up1(torch.cat([fine, F.interpolate(up, scale_factor=2.0)], 1)))
        return out


@case(split="held")
def healthy_segmentation_summed_over_pixels() -> Setup:
    """A U-Net whose loss is a sum over every pixel of the batch: it begins in the thousands."""
    y = (F.interpolate(torch.randn(200, 1, 4, 4), size=16, mode="bicubic") > 0).float()
    x = y - 0.5 + 0.7 * torch.randn_like(y)
    model = UNet()
    return Setup(
        model,
        adam(model, 3e-3),
        sampler(x, y, 12),
        lambda m, x, y: F.binary_cross_entropy_with_logits(m(x), y, reduction="sum"),
        150,
    )


@case(split="held")
def healthy_quantiles_of_prices() -> Setup:
    """Targets of several hundred; the head begins at their mean and the rate of Adam fits."""
    x, y = teacher()
    y = 300 + 120 * y
    model = mlp((8, 32, 3))
    levels = torch.tensor([0.1, 0.5, 0.9])
    nn.init.constant_(list(model.parameters())[-1], 300.0)

    def pinball(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        gap = y - m(x)
        return torch.maximum(levels * gap, (levels - 1) * gap).mean()

    return Setup(model, adam(model, 0.03), sampler(x, y, 32), pinball, 500)


@case(split="held")
def healthy_bytes_as_inputs() -> Setup:
    """Raw features from 0 to 255, and a rule of thresholds: Adam copes at its usual rate."""
    x = torch.randint(0, 256, (800, 8)).float()
    y = (x[:, 0] > 100).long() + 2 * (x[:, 1] + x[:, 2] > 250).long()
    model = mlp((8, 64, 32, 4))
    return Setup(model, adam(model, 1e-3), sampler(x, y, 64), cross_entropy, 700)


@case(split="held")
def healthy_label_noise_plateau() -> Setup:
    """Fresh images every step, 40 % of the labels wrong: the loss is soon flat, and far from zero."""
    templates = torch.randn(8, 1, 8, 8)

    def batch(step: int) -> Batch:
        y = torch.randint(0, 8, (64,))
        x = templates[y] + 0.5 * torch.randn(64, 1, 8, 8)
        wrong = torch.rand(64) < 0.4
        return x, torch.where(wrong, (y + torch.randint(1, 8, (64,))) % 8, y)

    model = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.SiLU(), nn.Flatten(), nn.Linear(72, 8))
    return Setup(model, adamw(model, 3e-3), batch, cross_entropy, 700)


@case(split="held", slow=True)
def healthy_floor_of_float32() -> Setup:
    """Least squares without noise: the loss falls by twelve orders and then is nothing but rounding."""
    x = torch.randn(200, 12)
    y = x @ torch.randn(12, 3) + 0.5
    model = nn.Linear(12, 3)
    return Setup(model, sgd(model, 0.02, 0.5), sampler(x, y, 16), squared_error, 5000)


class Flow(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.nets = nn.ModuleList(mlp((1, 24, 24, 2), nn.Mish) for _ in range(layers))
        self.scale = nn.Parameter(torch.zeros(layers))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = torch.zeros(len(x))
        for net, scale in zip(self.nets, self.scale, strict=True):
            first, second = x[:, :1], x[:, 1:]
            log_scale, shift = net(first).chunk(2, 1)
            log_scale = log_scale.tanh() * 1.5 + scale
            log_det = log_det + log_scale.squeeze(1)
            x = torch.cat([second * log_scale.exp() + shift, first], 1)
        return x, log_det


@case(split="held")
def healthy_flow_below_zero() -> Setup:
    """The negative log-likelihood of a normalising flow: it crosses zero on its way."""
    model = Flow(4)
    x, y = moons(1000)
    x = 0.2 * (x - x.mean(0))

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        z, log_det = m(x)
        value: Tensor = (0.5 * z.square().sum(1) + math.log(2 * math.pi) - log_det).mean()
        return value

    return Setup(model, adam(model, 3e-3), sampler(x, y, 64), loss, 350)


@case(split="held")
def healthy_annealed_autoencoder() -> Setup:
    """A VAE whose KL term is brought in three times over: the loss rises by design with each."""
    y = torch.randint(0, 6, (500,))
    x = ((torch.randn(6, 48)[y] + 0.4 * torch.randn(500, 48)) > 0).float()
    model = nn.ModuleDict({"encoder": mlp((48, 32, 8)), "decoder": mlp((4, 32, 48))})
    clock = Clock(sampler(x, y, 32))

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        mean, log_var = model["encoder"](2 * x - 1).chunk(2, 1)
        out = model["decoder"](mean + (0.5 * log_var).exp() * torch.randn_like(mean))
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1).mean()
        weight = min(1.0, (clock.step % 150) / 75)
        value: Tensor = F.binary_cross_entropy_with_logits(out, x, reduction="sum") / len(x) + weight * kl
        return value

    return Setup(model, adam(model, 3e-3), clock, loss, 450)


@case(split="held")
def healthy_actor_critic() -> Setup:
    """Policy gradient, value error and entropy in one loss: of either sign, noisy around zero in the end."""
    x, y = blobs(600, spread=1.5)
    x = x / x.std()
    body, actor, critic = nn.Sequential(nn.Linear(10, 32), nn.Tanh()), nn.Linear(32, 4), nn.Linear(32, 1)
    nn.init.orthogonal_(actor.weight, gain=0.01)
    nn.init.zeros_(critic.weight)
    nn.init.zeros_(critic.bias)
    model = nn.ModuleDict({"body": body, "actor": actor, "critic": critic})

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        features = body(x)
        policy = actor(features).log_softmax(1)
        value = critic(features).squeeze(1)
        action = torch.multinomial(policy.detach().exp(), 1)
        reward = (action.squeeze(1) == y).float()
        advantage = (reward - value).detach()
        gain = (policy.gather(1, action).squeeze(1) * advantage).mean()
        entropy = -(policy.exp() * policy).sum(1).mean()
        total: Tensor = -gain + 0.5 * (reward - value).square().mean() - 0.01 * entropy
        return total

    return Setup(model, adam(model, 5e-3), sampler(x, y, 32), loss, 500, clip=0.5)


@case(split="held")
def healthy_two_networks_in_turn() -> Setup:
    """Image to image: critic and generator take turns, so that the loss has two sizes."""
    generator = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(16, 1, 3, padding=1), nn.Tanh()
    )
    critic = nn.Sequential(
        parametrizations.spectral_norm(nn.Conv2d(2, 16, 3, stride=2, padding=1)),
        nn.LeakyReLU(0.2),
        parametrizations.spectral_norm(nn.Conv2d(16, 16, 3, padding=1)),
        nn.LeakyReLU(0.2),
        nn.Conv2d(16, 1, 3, padding=1),
    )
    model = nn.ModuleDict({"generator": generator, "critic": critic})
    mask = (F.interpolate(torch.randn(200, 1, 3, 3), size=8, mode="bicubic") > 0).float() * 2 - 1
    photo = 0.8 * F.avg_pool2d(F.pad(mask, (1, 1, 1, 1), mode="replicate"), 3, 1)
    photo = photo + 0.05 * torch.randn_like(photo)
    clock = Clock(sampler(mask, photo, 16))

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        for p in critic.parameters():
            p.requires_grad_(clock.step % 2 == 0)
        fake = generator(x)
        if clock.step % 2 == 0:
            real = critic(torch.cat([x, y], 1))
            other = critic(torch.cat([x, fake.detach()], 1))
            value = F.relu(1 - real).mean() + F.relu(1 + other).mean()
        else:
            value = 20 * F.l1_loss(fake, y) - critic(torch.cat([x, fake], 1)).mean()
        for p in critic.parameters():
            p.requires_grad_(True)
        return value

    return Setup(model, adam(model, 2e-3, betas=(0.5, 0.999)), clock, loss, 300)


# Losses that come to exactly zero, or begin small


@case(split="held")
def healthy_margin_reached() -> Setup:
    """A hinge loss on separable data: with every margin kept, the loss and all gradients are zero."""
    model = mlp((10, 32, 4))
    x, y = blobs(spread=0.8)
    return Setup(
        model, sgd(model, 0.05), sampler(x, y, 32), lambda m, x, y: F.multi_margin_loss(m(x), y), 400
    )


@case(split="held")
def healthy_triplets() -> Setup:
    """Triplets drawn at random: ever more batches hold none that breaks the margin, and give no gradient."""
    model = mlp((10, 32, 8))
    x, y = blobs(classes=8, spread=1.5)

    def batch(step: int) -> Batch:
        anchor = torch.randint(0, len(x), (8,))
        same = torch.stack(
            [torch.nonzero(y == y[i]).flatten()[torch.randint(0, int((y == y[i]).sum()), ())] for i in anchor]
        )
        other = torch.stack(
            [torch.nonzero(y != y[i]).flatten()[torch.randint(0, int((y != y[i]).sum()), ())] for i in anchor]
        )
        return torch.stack([x[anchor], x[same], x[other]], 1), y[anchor]

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        a, p, n = F.normalize(m(x), dim=2).unbind(1)
        return F.triplet_margin_loss(a, p, n, margin=0.4)

    return Setup(model, adam(model, 2e-3), batch, loss, 350)


@case(split="held")
def healthy_focal_loss_of_a_rare_class() -> Setup:
    """One in a hundred is positive, and the head's bias says so from the start: the loss begins at 0.01."""
    y = (torch.arange(3000) % 100 == 0).float().unsqueeze(1)
    x = torch.randn(3000, 10) + y * 2.0 * torch.randn(10).sign()
    model = mlp((10, 32, 1))
    nn.init.constant_(list(model.parameters())[-1], -math.log(99))

    def focal(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logit = m(x)
        missed = torch.where(y == 1, torch.sigmoid(-logit), torch.sigmoid(logit))
        return (missed.square() * F.binary_cross_entropy_with_logits(logit, y, reduction="none")).mean()

    return Setup(model, adam(model, 2e-3), sampler(x, y, 256), focal, 400)


@case(split="held", outcome="stays")
def healthy_resumed_at_the_noise() -> Setup:
    """Resumed with the small rate of the end of a schedule: nothing is left to be learned."""
    x, y = teacher(4000)
    y = y + 0.5 * torch.randn_like(y)
    model = mlp((8, 16, 1), nn.Tanh)
    train(Setup(model, adam(model, 5e-3), sampler(x, y, 128), squared_error, 700))
    return Setup(model, adam(model, 1e-5), sampler(x, y, 1000), squared_error, 400)


# Fine-tuning, and branches that begin at zero


@case(split="held")
def healthy_rates_by_layer() -> Setup:
    """Fine-tuning: the trained body at a rate of 1e-5, the new head at a thousand times that."""
    x, y = blobs(800, 8, spread=1.5)
    body = nn.Sequential(*mlp((10, 48, 48)), nn.ReLU())
    model = nn.Sequential(body, nn.Linear(48, 8))
    train(Setup(model, adam(model, 3e-3), sampler(x, y, 64), cross_entropy, 200))
    model[1] = nn.Linear(48, 3)
    optimizer = torch.optim.AdamW(
        [
            {"params": body.parameters(), "lr": 1e-5},
            {"params": model[1].parameters(), "lr": 1e-2},
        ]
    )
    return Setup(model, optimizer, sampler(x, y % 3, 32), cross_entropy, 300)


class Adapter(nn.Module):
    """A frozen layer and a product of two thin matrices beside it, the second of which begins at zero."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, layer.in_features) / math.sqrt(layer.in_features))
        self.b = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) + 2 * (x @ self.a.T) @ self.b.T
        return out


@case(split="held")
def healthy_low_rank_adapters() -> Setup:
    """A frozen transformer adapted to another language: at first half the factors have no gradient."""
    model = Transformer(blocks=1)
    train(Setup(model, adam(model, 1e-2), markov(16, 16), cross_entropy, 60))
    model.requires_grad_(False)
    for block in model.blocks:
        for name in ("qkv", "out", "up", "down"):
            setattr(block, name, Adapter(getattr(block, name), 4))
    return Setup(model, adamw(model, 1e-2), markov(16, 16), cross_entropy, 250)


class ZeroGated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.gate * self.down(self.act(self.up(x)))
        return out


@case(split="held")
def healthy_thirty_gated_blocks() -> Setup:
    """ReZero: no norm, and every branch is multiplied by a number that begins at zero."""
    model = nn.Sequential(nn.Linear(10, 24), *(ZeroGated(24) for _ in range(30)), nn.Linear(24, 4))
    return Setup(model, adam(model, 2e-3), sampler(*blobs(spread=2.0), 32), cross_entropy, 130)


class ConvNeXt(nn.Module):
    def __init__(self, width: int, drop: float) -> None:
        super().__init__()
        self.mix = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm, self.act = nn.LayerNorm(width), nn.GELU()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 1e-4))
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        if self.training and float(torch.rand(())) < self.drop:
            return x
        inner = self.norm(self.mix(x).movedim(1, -1))
        out: Tensor = x + (self.scale * self.down(self.act(self.up(inner)))).movedim(-1, 1)
        return out


@case(split="held")
def healthy_scaled_and_dropped_branches() -> Setup:
    """ConvNeXt: branches scaled by 1e-4 at first, of which the last is left out of two steps in five."""
    blocks = [ConvNeXt(16, 0.4 * place / 4) for place in range(5)]
    model = nn.Sequential(
        nn.Conv2d(1, 16, 2, stride=2),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(16),
        nn.Linear(16, 4),
    )
    x, y = images()
    return Setup(model, adamw(model, 4e-3, weight_decay=0.05), sampler(x, y, 32), cross_entropy, 200)


# Parameters used on some steps only


class Experts(nn.Module):
    def __init__(self, inputs: int, outputs: int, count: int) -> None:
        super().__init__()
        self.router = nn.Linear(inputs, count)
        self.experts = nn.ModuleList(mlp((inputs, 16, outputs)) for _ in range(count))
        self.outputs = outputs

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        share = self.router(x).softmax(1)
        weight, chosen = share.topk(2, dim=1)
        weight = weight / weight.sum(1, keepdim=True)
        out = x.new_zeros(len(x), self.outputs)
        for place, expert in enumerate(self.experts):
            rows, ranks = torch.nonzero(chosen == place).unbind(1)
            if len(rows):
                out = out.index_add(0, rows, weight[rows, ranks].unsqueeze(1) * expert(x[rows]))
        used = F.one_hot(chosen, share.shape[1]).float().mean((0, 1))
        return out, share.shape[1] * (used * share.mean(0)).sum()


@case(split="held")
def healthy_mixture_of_experts() -> Setup:
    """Each row of a batch of five asks two of eight experts: on most steps some have no gradient at all."""
    model = Experts(10, 6, 8)
    x, y = blobs(800, 6)

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out, balance = m(x)
        value: Tensor = F.cross_entropy(out, y) + 0.03 * balance
        return value

    return Setup(model, adam(model, 2e-3), sampler(0.3 * x, y, 5), loss, 600)


@case(split="held")
def healthy_rare_words() -> Setup:
    """Word vectors by negative sampling, of Zipf's distribution; the output vectors begin at zero."""
    words, topics = 600, 6
    often = 1 / torch.arange(1, words + 1).float()
    topic = torch.arange(words) % topics
    model = nn.ModuleDict({"centre": nn.Embedding(words, 16), "context": nn.Embedding(words, 16)})
    with torch.no_grad():
        for p in model["centre"].parameters():
            p.uniform_(-0.5 / 16, 0.5 / 16)
        for p in model["context"].parameters():
            p.zero_()

    def batch(step: int) -> Batch:
        centre = torch.multinomial(often, 64, replacement=True)
        near = often * (0.02 + (topic == topic[centre].unsqueeze(1)).float())
        near = torch.multinomial(near, 1)
        noise = torch.multinomial(often.pow(0.75), 64 * 5, replacement=True).view(64, 5)
        return centre, torch.cat([near, noise], 1)

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        score = (model["context"](y) @ model["centre"](x).unsqueeze(2)).squeeze(2)
        sign = torch.tensor([1.0, *[-1.0] * 5])
        return -F.logsigmoid(sign * score).sum(1).mean()

    return Setup(model, torch.optim.Adagrad(model.parameters(), lr=0.3), batch, loss, 500)


@case(split="held")
def healthy_words_of_a_bag() -> Setup:
    """Counts of words: nearly all inputs are zero, many columns always, and three are always the same."""
    topic = torch.randint(0, 5, (600,))
    x = torch.zeros(600, 400)
    words = torch.where(
        torch.rand(600, 12) < 0.4,
        topic.unsqueeze(1) + 5 * torch.randint(0, 40, (600, 12)),
        torch.randint(0, 200, (600, 12)),
    )
    x.scatter_add_(1, words, torch.ones(600, 12))
    x[:, -3:] = 1.0
    model = mlp((400, 32, 5))
    return Setup(model, adam(model, 3e-3), sampler(x, topic, 32), cross_entropy, 300)


class TopUnits(nn.Module):
    def __init__(self, inputs: int, units: int, keep: int) -> None:
        super().__init__()
        self.encoder, self.act, self.decoder = nn.Linear(inputs, units), nn.ReLU(), nn.Linear(units, inputs)
        self.keep = keep
        with torch.no_grad():
            self.decoder.weight.copy_(F.normalize(torch.randn(inputs, units), dim=0))
            self.encoder.weight.copy_(self.decoder.weight.T)

    def forward(self, x: Tensor) -> Tensor:
        code = self.encoder(x)
        least = code.topk(self.keep, dim=1).values[:, -1:]
        out: Tensor = self.decoder(self.act(torch.where(code >= least, code, 0.0)))
        return out


@case(split="held")
def healthy_sparse_dictionary() -> Setup:
    """An autoencoder that keeps six of its 96 units: the others give zero, and so do their gradients."""
    atoms = F.normalize(torch.randn(48, 16), dim=1)

    def batch(step: int) -> Batch:
        code = torch.rand(64, 48) * (torch.rand(64, 48) < 0.06)
        x = code @ atoms
        return x, x

    model = TopUnits(16, 96, 6)
    return Setup(model, adam(model, 3e-3), batch, squared_error, 400)


# Sequences


class TiedLanguageModel(nn.Module):
    def __init__(self, symbols: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, width)
        self.rnn = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, symbols)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.rnn(self.embed(x))[0])
        return out


@case(split="held")
def healthy_tied_words_over_hundred_steps() -> Setup:
    """An LSTM that shares one matrix for input and output, and is clipped at 0.1 on every step."""
    model = TiedLanguageModel(12, 24)
    return Setup(model, adam(model, 1e-2), markov(8, 100), cross_entropy, 100, clip=0.1)


class Dilated(nn.Module):
    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.filter = parametrizations.weight_norm(nn.Conv1d(width, width, 2, dilation=dilation))
        self.gate = parametrizations.weight_norm(nn.Conv1d(width, width, 2, dilation=dilation))
        self.mix = nn.Conv1d(width, width, 1)
        self.tanh, self.sigmoid = nn.Tanh(), nn.Sigmoid()
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (self.dilation, 0))
        out: Tensor = x + self.mix(self.tanh(self.filter(padded)) * self.sigmoid(self.gate(padded)))
        return out


@case(split="held")
def healthy_waves() -> Setup:
    """WaveNet: dilated convolutions with weight norm, gated by sigmoids, predict the next value of a wave."""

    def batch(step: int) -> Batch:
        time = torch.arange(65.0) + 100 * torch.rand(16, 1)
        pace = 0.1 + 0.5 * torch.rand(16, 2, 1)
        wave = (pace * time.unsqueeze(1)).sin().sum(1, keepdim=True) + 0.05 * torch.randn(16, 1, 65)
        return wave[..., :-1], wave[..., 1:]

    model = nn.Sequential(
        nn.Conv1d(1, 16, 1), *(Dilated(16, 2**place) for place in range(5)), nn.ReLU(), nn.Conv1d(16, 1, 1)
    )
    return Setup(model, adam(model, 3e-3), batch, squared_error, 200)


@case(split="held")
def healthy_ragged_speech() -> Setup:
    """CTC on one to twelve sequences of 6 to 34 frames: every batch has a loss of its own size."""
    sounds = torch.randn(5, 6)

    def batch(step: int) -> Batch:
        count = int(torch.randint(1, 13, ()))
        x, y = torch.zeros(count, 40, 6), torch.zeros(count, 10, dtype=torch.long)
        for row in range(count):
            length = int(torch.randint(2, 9, ()))
            symbols = torch.randint(0, 5, (length,))
            frames = torch.cat([sounds[s].repeat(int(torch.randint(2, 5, ())), 1) for s in symbols])
            frames = torch.cat([frames, torch.zeros(2, 6)])
            x[row, : len(frames)] = frames + 0.3 * torch.randn_like(frames)
            y[row, :length] = symbols + 1
            y[row, 8], y[row, 9] = len(frames), length
        return x, y

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        scores = m(x).log_softmax(2).transpose(0, 1)
        return F.ctc_loss(scores, y[:, :8], y[:, 8], y[:, 9])

    model = Recurrent("GRU", 6, 24, 6, every=True)
    return Setup(model, adam(model, 1e-2), batch, loss, 200, clip=5.0)


@case(split="held")
def healthy_orthogonal_memory() -> Setup:
    """A plain recurrent net, orthogonal at first, says after fifty steps which symbol came first."""
    model = Recurrent("RNN", 5, 32, 4)
    nn.init.orthogonal_(model.rnn.weight_hh_l0)
    nn.init.zeros_(model.rnn.bias_hh_l0)
    nn.init.zeros_(model.rnn.bias_ih_l0)

    def batch(step: int) -> Batch:
        y = torch.randint(0, 4, (32,))
        x = torch.zeros(32, 50, 5)
        x[:, 0, :4] = F.one_hot(y, 4).float()
        x[:, 1:, 4] = 0.1 * torch.randn(32, 49)
        return x, y

    return Setup(model, adam(model, 1e-3), batch, cross_entropy, 150, clip=1.0, probes_time=True)


class Lookup(nn.Module):
    """Attention with one projection for queries and keys, and no division by the root of the width."""

    def __init__(self, width: int, symbols: int) -> None:
        super().__init__()
        self.key, self.value = nn.Linear(width, width, bias=False), nn.Linear(symbols, 16)
        self.head = mlp((16, 32, symbols), nn.GELU)
        nn.init.orthogonal_(self.key.weight, gain=2.0)

    def forward(self, x: Tensor) -> Tensor:
        query, keys, values = x[:, 0, :16], x[:, 1:, :16], x[:, 1:, 16:]
        logits = self.key(keys) @ self.key(query).unsqueeze(2)
        out: Tensor = self.head((logits.softmax(1) * self.value(values)).sum(1))
        return out


@case(split="held")
def healthy_sharp_attention() -> Setup:
    """Look-up by content: logits of a hundred, weights of one and zero, and that is what they are for."""

    def batch(step: int) -> Batch:
        keys, y = torch.randn(32, 8, 16), torch.randint(0, 6, (32, 8))
        asked = torch.randint(0, 8, (32,))
        rows = torch.arange(32)
        query = keys[rows, asked] + 0.2 * torch.randn(32, 16)
        items = torch.cat([keys, F.one_hot(y, 6).float()], 2)
        return torch.cat([F.pad(query, (0, 6)).unsqueeze(1), items], 1), y[rows, asked]

    model = Lookup(16, 6)
    return Setup(model, adam(model, 3e-3), batch, cross_entropy, 300)


# Schedules and optimizers


@case(split="held")
def healthy_mixed_images_one_cycle() -> Setup:
    """Mixup, smoothed labels and one cycle up to a rate of 0.5: the loss never comes near zero."""
    x, y = images(400)

    def batch(step: int) -> Batch:
        first, second = torch.randint(0, len(x), (2, 48))
        share = torch.distributions.Beta(0.4, 0.4).sample((48, 1))
        soft = share * F.one_hot(y[first], 4) + (1 - share) * F.one_hot(y[second], 4)
        share = share.view(48, 1, 1, 1)
        return share * x[first] + (1 - share) * x[second], soft

    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, stride=2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(144, 4),
    )
    optimizer = sgd(model, 0.02, 0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=250)
    return Setup(
        model,
        optimizer,
        batch,
        lambda m, x, y: F.cross_entropy(m(x), y, label_smoothing=0.1),
        250,
        scheduler=schedule,
    )


class Highway(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.sigmoid = nn.Linear(width, width), nn.Sigmoid()
        self.inner, self.tanh = nn.Linear(width, width), nn.Tanh()
        nn.init.constant_(self.gate.bias, -4.0)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.sigmoid(self.gate(x))
        out: Tensor = gate * self.tanh(self.inner(x)) + (1 - gate) * x
        return out


@case(split="held")
def healthy_curriculum() -> Setup:
    """A highway net, its gates all but shut at first, is given harder data twice: the loss jumps."""
    model = nn.Sequential(nn.Linear(10, 24), *(Highway(24) for _ in range(8)), nn.Linear(24, 4))
    centres = torch.randn(4, 10)

    def batch(step: int) -> Batch:
        y = torch.randint(0, 4, (32,))
        spread = 0.2 if step < 120 else 0.7 if step < 240 else 1.1
        return centres[y] + spread * torch.randn(32, 10), y

    return Setup(model, adam(model, 3e-3), batch, cross_entropy, 360)


class Dense(nn.Module):
    """Layers that each read all that came before them, and a head halfway."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(8 + 6 * place),
                nn.ReLU(),
                nn.Conv2d(8 + 6 * place, 6, 3, padding=1, bias=False),
            )
            for place in range(6)
        )
        self.early, self.head = nn.Linear(26, 4), nn.Linear(44, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = F.max_pool2d(self.stem(x), 2)
        early = found
        for place, layer in enumerate(self.layers):
            if place == 3:
                early = found
            found = torch.cat([found, layer(found)], 1)
        return self.head(found.amax((2, 3))), self.early(early.amax((2, 3)))


@case(split="held")
def healthy_auxiliary_head_fades() -> Setup:
    """A densely connected net with a second head, whose weight in the loss goes down to exactly zero."""
    model = Dense()
    clock = Clock(sampler(*images(), 24))

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out, early = m(x)
        weight = 0.5 * max(0.0, 1 - clock.step / 120)
        return F.cross_entropy(out, y) + weight * F.cross_entropy(early, y)

    return Setup(model, sgd(model, 0.02, 0.9), clock, loss, 180)


@case(split="held", slow=True)
def healthy_cycles() -> Setup:
    """The rate goes up and down tenfold every 500 steps, and the loss breathes with it."""
    model = mlp((8, 24, 1))
    optimizer = sgd(model, 0.01, 0.9)
    schedule = torch.optim.lr_scheduler.CyclicLR(
        optimizer, 0.003, 0.03, step_size_up=250, base_momentum=0.8, max_momentum=0.9
    )
    return Setup(model, optimizer, sampler(*teacher(), 8), squared_error, 5500, scheduler=schedule)


@case(split="held")
def healthy_rate_from_zero_to_zero() -> Setup:
    """AdamW with a decay of 0.1: the first step has a rate of zero, and so have the last eight."""
    model = Transformer(blocks=1)
    optimizer = adamw(model, 1e-2, weight_decay=0.1)
    schedule = multiplied(optimizer, lambda step: min(step / 25, max(0.0, (232 - step) / 207)))
    return Setup(model, optimizer, markov(16, 16), cross_entropy, 240, scheduler=schedule)


@case(split="held")
def healthy_nesterov() -> Setup:
    """Momentum of 0.99 with a rate to match."""
    model = mlp((8, 32, 1), nn.Softplus)
    optimizer = sgd(model, 2e-3, 0.99, nesterov=True)
    return Setup(model, optimizer, sampler(*teacher(), 32), squared_error, 600)


class Inverted(nn.Module):
    """The block of MobileNetV3: widen, depthwise convolution, gate by channel, narrow."""

    def __init__(self, width: int) -> None:
        super().__init__()
        wide = 2 * width
        self.up = nn.Sequential(nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.Hardswish())
        self.mix = nn.Sequential(
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.Hardswish()
        )
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(wide, 12, 1),
            nn.ReLU(),
            nn.Conv2d(12, wide, 1),
            nn.Hardsigmoid(),
        )
        self.down = nn.Sequential(nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.mix(self.up(x))
        out: Tensor = x + self.down(inner * self.gate(inner))
        return out


@case(split="held")
def healthy_gated_channels_rmsprop() -> Setup:
    """MobileNet with its own recipe: RMSprop with momentum and a large eps."""
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(12),
        *(Inverted(12) for _ in range(3)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 4),
    )
    optimizer = torch.optim.RMSprop(model.parameters(), 1e-3, momentum=0.9, eps=1e-3, weight_decay=1e-5)
    return Setup(model, optimizer, sampler(*images(), 32), cross_entropy, 130)


@case(split="held")
def healthy_accumulation() -> Setup:
    """Four small batches go forward and backward before each step, so that their gradients add up."""
    model = nn.Sequential(nn.Linear(10, 32), Residual(32), Residual(32), nn.Linear(32, 4))

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        parts = [cross_entropy(m, *part) / 4 for part in zip(x.chunk(4), y.chunk(4), strict=True)]
        for part in parts[:3]:
            torch.autograd.backward(part)
        return parts[3] + sum(part.detach() for part in parts[:3])

    return Setup(model, adam(model, 1e-3), sampler(*blobs(spread=2.0), 32), loss, 250)


@case(split="held")
def healthy_outlier_every_hundred_steps() -> Setup:
    """A batch of tenfold inputs now and then: the clip, which hardly acts otherwise, makes it harmless."""
    model = mlp((10, 32, 32, 4))
    draw = sampler(*blobs(spread=2.0), 32)

    def batch(step: int) -> Batch:
        x, y = draw(step)
        return (10 * x, y) if step % 100 == 99 else (x, y)

    return Setup(model, sgd(model, 0.03, 0.9), batch, cross_entropy, 600, clip=2.0)


# Half precision


@case(split="held")
def healthy_autocast_backs_off() -> Setup:
    """Float16 by autocast; the first scale is too large for it, and is halved until it is not."""
    model = mlp((10, 48, 48, 4))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**19)

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            return F.cross_entropy(m(x).float(), y)

    return Setup(
        model,
        adamw(model, 3e-3),
        sampler(*blobs(spread=2.0), 32),
        loss,
        250,
        scaler=scaler,
    )


class Mixed(nn.Module):
    """A residual block of bfloat16 weights behind a norm in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(width), nn.GELU()
        self.up = nn.Linear(width, 2 * width, dtype=torch.bfloat16)
        self.down = nn.Linear(2 * width, width, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm(x).bfloat16()
        out: Tensor = x + self.down(self.act(self.up(inner))).float()
        return out


@case(split="held")
def healthy_bfloat16_body() -> Setup:
    """Weights of bfloat16 between norms and a head of float32: half of all changes are rounded away."""
    model = nn.Sequential(
        nn.Linear(10, 32), *(Mixed(32) for _ in range(4)), nn.LayerNorm(32), nn.Linear(32, 4)
    )
    return Setup(model, adamw(model, 1e-3), sampler(*blobs(spread=2.0), 32), cross_entropy, 200)


# Targets and derivatives of a special kind


@case(split="held")
def healthy_black_and_white() -> Setup:
    """Pictures of -1 and 1 out of a tanh: the better it does, the more its last layer is saturated."""
    y = torch.randint(0, 8, (400,))
    x = (torch.randn(8, 64)[y] + 0.3 * torch.randn(400, 64)).sign()
    model = nn.Sequential(*mlp((64, 48, 8, 48, 64)), nn.Tanh())
    return Setup(model, adam(model, 3e-3), sampler(x, x, 32), squared_error, 400)


@case(split="held")
def healthy_contrasts_sharp_temperature() -> Setup:
    """Two towers and a temperature that is learned, from 0.05 on."""
    latent = torch.randn(1000, 6)
    seen = latent @ torch.randn(6, 16) + 0.2 * torch.randn(1000, 16)
    told = (latent @ torch.randn(6, 12)).tanh() + 0.1 * torch.randn(1000, 12)
    model = nn.ModuleDict({"image": mlp((16, 48, 12), nn.GELU), "text": mlp((12, 48, 12), nn.GELU)})
    model.register_parameter("log_scale", nn.Parameter(torch.tensor(math.log(20.0))))

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        a, b = F.normalize(model["image"](x), dim=1), F.normalize(model["text"](y), dim=1)
        logits = m.get_parameter("log_scale").exp() * a @ b.T
        own = torch.arange(len(x))
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    return Setup(model, adamw(model, 2e-3), sampler(seen, told, 48), loss, 250)


class Denoiser(nn.Module):
    """Predicts the noise in a point of the plane; both are seen through random waves."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("waves", 3.0 * torch.randn(2, 16))
        self.register_buffer("times", 8.0 * torch.randn(1, 8))
        self.net = mlp((48 + 2, 64, 64, 2), nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        point, time = x[:, :2], x[:, 2:]
        phases = torch.cat([point @ self.get_buffer("waves"), time @ self.get_buffer("times")], 1)
        out: Tensor = self.net(torch.cat([point, phases.sin(), phases.cos()], 1))
        return out


@case(split="held")
def healthy_diffusion() -> Setup:
    """A diffusion model: part of the noise cannot be predicted, and every batch is another mix."""
    data, _ = moons(1000)
    model = Denoiser()

    def batch(step: int) -> Batch:
        time, noise = torch.rand(64, 1), torch.randn(64, 2)
        angle = time * math.pi / 2
        clean = data[torch.randint(0, len(data), (64,))]
        return torch.cat([angle.cos() * clean + angle.sin() * noise, time], 1), noise

    return Setup(model, adam(model, 2e-3), batch, squared_error, 600)


@case(split="held")
def healthy_physics() -> Setup:
    """Solves u'' = f through second derivatives of the net; the ends weigh a hundred times the rest."""
    model = mlp((1, 24, 24, 1), nn.Tanh)

    def batch(step: int) -> Batch:
        x = torch.rand(48, 1)
        return x, -(math.pi**2) * (math.pi * x).sin()

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        u = m(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (curve,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        ends = m(torch.tensor([[0.0], [1.0]]))
        value: Tensor = (curve - y).square().mean() + 100 * ends.square().mean()
        return value

    return Setup(model, adam(model, 5e-3), batch, loss, 500)
