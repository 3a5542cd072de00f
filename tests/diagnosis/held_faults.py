"""More runs with one fault each, by someone who had not seen the detectors either.

As in ``user_faults``: each case is a run that learns, into which one fault is put, and ``fault=False`` makes
the same run without it. The first label is the category of the fault. All were trained both ways, in plain
torch, on seeds 1 to 4: without the fault a run learns, and with it the loss is NaN, diverges, stays where it
began, or ends at more than twice what it ends at without. Other remedies were tried on the faulty runs, on
the same seeds: a rate divided or multiplied by 10, 100 and 1000, clipping at 1 and at 0.1, the loss times or
over 100, Adam's epsilon, standardised data, with and without a bound, Kaiming's and Xavier's weights, other
activations, float32 and float64; for two cases, data standardised before it is rounded, and no loss scale at
all. Where one of them repairs a run as well as undoing the fault does, on all four seeds, its category is the
second label.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.diagnosis.runs import Batch, Setup
from tests.diagnosis.suite import (
    Recurrent,
    Transformer,
    adam,
    blobs,
    case,
    circles,
    cnn,
    cross_entropy,
    images,
    last_symbol,
    mlp,
    sampler,
    sgd,
    squared_error,
    teacher,
)

NONFINITE = ("loss_nonfinite", "grad_nonfinite", "weights_nonfinite")
STANDSTILL = ("update_ratio_low", "no_traction")
WILD = ("loss_diverging", "loss_unstable", "exploding_gradient", "update_ratio_high", "no_traction")
SHOCK = ("loss_spike", "gradient_spike", "update_spike")
DEAD = ("dead_relu", "zero_gradient")

# Data


class Neighbours(nn.Module):
    """Two graph layers over rows that hold a node's normalised links, then its features."""

    def __init__(self, nodes: int, inputs: int, classes: int) -> None:
        super().__init__()
        self.nodes = nodes
        self.own, self.near, self.head = nn.Linear(inputs, 32), nn.Linear(inputs, 32), nn.Linear(64, classes)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        links, features = x[:, : self.nodes], x[:, self.nodes :]
        h = self.act(self.own(features) + links @ self.near(features))
        out: Tensor = self.head(torch.cat([h, links @ h], 1))
        return out


@case("data", split="held", must=("data_nonfinite", *NONFINITE))
def node_without_neighbours(fault: bool = True) -> Setup:
    """Links are divided by their number, which for some sampled node is now and then zero."""
    count, picked = 300, 75
    where = torch.rand(count, 2)
    gaps = torch.cdist(where, where) + 9 * torch.eye(count)
    near = torch.zeros(count, count).scatter(1, gaps.topk(27, largest=False).indices, 1.0)
    features = torch.randn(count, 6)
    around = near @ features[:, 0]
    y = (around > around.median()).long() + 2 * (features[:, 1] > 0).long()

    def batch(step: int) -> Batch:
        nodes = torch.randperm(count)[:picked]
        links = near[nodes][:, nodes]
        links = links / links.sum(1, keepdim=True).clamp(min=0.0 if fault else 1.0)
        return torch.cat([links, features[nodes]], 1), y[nodes]

    model = Neighbours(picked, 6, 4)
    return Setup(model, adam(model, 0.01), batch, cross_entropy, 300)


@case("data", split="held", must=("data_scale", *DEAD, *SHOCK, *WILD, *NONFINITE))
def second_shard_of_integers(fault: bool = True) -> Setup:
    """The second half of the recordings was stored as 16-bit integers and is not divided by 32768."""
    pitch = torch.tensor([0.2, 0.45, 0.8, 1.3])

    def batch(step: int) -> Batch:
        y = torch.randint(0, 4, (32,))
        phase = 6.3 * torch.rand(32, 1) + pitch[y, None] * torch.arange(64)
        wave = (0.2 + 0.5 * torch.rand(32, 1)) * phase.sin() + 0.7 * torch.randn(32, 64)
        return wave[:, None] * (32768.0 if fault and step >= 130 else 1.0), y

    model = nn.Sequential(
        nn.Conv1d(1, 12, 9, stride=2, padding=4),
        nn.ReLU(),
        nn.Conv1d(12, 16, 9, stride=2, padding=4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 4),
    )
    return Setup(model, sgd(model, 0.05, 0.9), batch, cross_entropy, 250)


@case("data", split="held", must=("data_scale", "no_traction", *DEAD))
def pixels_divided_as_integers(fault: bool = True) -> Setup:
    """Bytes are divided by 255 before they become floats, which leaves zeros."""
    x, y = images()
    pixels = (110 + 35 * x).clamp(0, 254).byte()
    model = cnn()
    x = (pixels // 255).float() if fault else pixels.float() / 255
    return Setup(model, sgd(model, 0.1, 0.9), sampler(x, y, 32), cross_entropy)


@case("data", split="held", must=("data_scale", "no_traction", "dead_relu"))
def normalised_for_the_other_range(fault: bool = True) -> Setup:
    """Pixels between 0 and 1 are standardised with the mean and deviation of bytes."""
    x, y = images()
    pixels = (0.45 + 0.2 * x).clamp(0, 1)
    scale = 255.0 if fault else 1.0
    pixels = (pixels - 0.45 * scale) / (0.22 * scale)
    model = cnn()
    return Setup(model, sgd(model, 0.02, 0.9), sampler(pixels, y, 32), cross_entropy)


@case("data", split="held", must=("data_scale", "weights_growing", *WILD, *SHOCK, *NONFINITE))
def augmented_in_place(fault: bool = True) -> Setup:
    """Each time that a sample is drawn, its gain is changed in the stored data."""
    phase = 6.3 * torch.rand(300, 1) + (0.3 + torch.rand(300, 1)) * torch.arange(25)
    stored = phase.sin()

    def batch(step: int) -> Batch:
        picked = torch.randperm(300)[:32]
        wave = stored[picked] * (0.6 + 1.2 * torch.rand(32, 1))
        if fault:
            stored[picked] = wave
        return wave[:, :-1], wave[:, -1:]

    model = mlp((24, 48, 48, 1))
    return Setup(model, sgd(model, 0.02, 0.9), batch, squared_error, 400)


@case("data", split="held", must=("data_scale", *WILD, *SHOCK, *NONFINITE))
def points_of_a_game(fault: bool = True) -> Setup:
    """Values of states are learned from differences in time; rewards are the thousands of a score."""
    wanted = torch.randn(6, 1)

    def batch(step: int) -> Batch:
        state = torch.randn(64, 6)
        after = 0.9 * state.roll(1, 1) + 0.2 * torch.randn(64, 6)
        return torch.cat([state, after], 1), (40000.0 if fault else 1.0) * (state @ wanted).tanh()

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        state, after = x.chunk(2, 1)
        with torch.no_grad():
            target = y + 0.7 * m(after)
        return F.mse_loss(m(state), target)

    model = mlp((6, 48, 48, 1))
    return Setup(model, sgd(model, 0.02, 0.9), batch, loss, 300)


@case(
    "data",
    split="held",
    must=("loss_diverging", "loss_unstable", "exploding_gradient", "no_traction", *SHOCK),
)
def sorted_by_class(fault: bool = True) -> Setup:
    """The file is sorted by class and is read in its order."""
    x, y = blobs(800, classes=5, spread=2.0)
    order = y.argsort(stable=True) if fault else torch.randperm(800)
    x, y = x[order], y[order]

    def batch(step: int) -> Batch:
        rows = slice(8 * step % 800, 8 * step % 800 + 8)
        return x[rows], y[rows]

    model = mlp((10, 48, 48, 5))
    return Setup(model, sgd(model, 0.03, 0.9), batch, cross_entropy, 400)


@case("data", "optimizer", split="held", must=("data_scale", *SHOCK, *WILD, *NONFINITE))
def propensities_near_zero(fault: bool = True) -> Setup:
    """What was logged is weighted by the inverse of its probability, which is sometimes a millionth."""
    x, y = blobs(600, spread=1.5)
    hard = torch.rand(600, 1) ** 8 + 1e-7
    weight = 1 / hard.clamp(min=0.0 if fault else 0.1)
    model = mlp((10, 48, 4))

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        label, weight = y.long()[:, 0], y[:, 1]
        return (weight * F.cross_entropy(m(x), label, reduction="none")).mean()

    return Setup(model, sgd(model, 0.01, 0.9), sampler(x, torch.cat([y[:, None], weight], 1), 32), loss, 300)


# Dtype


@case(
    "dtype",
    split="held",
    must=("no_traction", "loss_unstable", "fp16_underflow", "fp16_overflow", "amp_backoff"),
)
def differences_in_half(fault: bool = True) -> Setup:
    """A slope is fitted, by differences over steps so short that float16 rounds them away."""
    model, gap = mlp((1, 32, 32, 1), nn.Tanh), 6e-5

    def batch(step: int) -> Batch:
        x = 4 * torch.rand(64, 1) - 2
        return x, (2 * x).cos()

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16, enabled=fault):
            above, below = m(x + gap), m(x - gap)
        return F.mse_loss((above.float() - below.float()) / (2 * gap), y)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return Setup(model, adam(model, 5e-3), batch, loss, 300, scaler=scaler)


@case("dtype", split="held", must=("amp_backoff", "fp16_overflow", "grad_nonfinite", "no_traction"))
def scale_backs_off_too_slowly(fault: bool = True) -> Setup:
    """The loss scale starts far too high and comes down by a thousandth at a time."""
    model = mlp((16, 48, 8, 48, 16))
    x = torch.randn(400, 5) @ torch.randn(5, 16) / 2

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            out = m(x)
        return F.mse_loss(out.float(), y)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=0.999 if fault else 0.5)
    return Setup(model, adam(model, 3e-3), sampler(x, x, 32), loss, 250, scaler=scaler)


@case(
    "dtype",
    "optimizer",
    split="held",
    must=("fp16_underflow", "no_traction", "zero_gradient", "vanishing_gradient"),
)
def autocast_without_scaler(fault: bool = True) -> Setup:
    """A small net learns the softened probabilities of a large one: its gradients vanish in float16."""
    large, small = mlp((12, 48, 100), gain=2.0), mlp((12, 48, 48, 100))

    def batch(step: int) -> Batch:
        x = torch.randn(128, 12)
        with torch.no_grad():
            return x, (large(x) / 20).softmax(1)

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            out = m(x)
        chances: Tensor = (out.float() / 20).log_softmax(1)
        return (y * (y.log() - chances)).mean()

    scaler = None if fault else torch.amp.GradScaler("cpu", init_scale=2.0**20)
    return Setup(small, adam(small, 3e-3, eps=1e-15), batch, loss, 250, scaler=scaler)


class Kernel(nn.Module):
    """Covariances of points: those of a Gaussian of the distance between what a net makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.log_noise = mlp((1, 24, 2), nn.Tanh), nn.Parameter(torch.tensor(-5.0))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.cat([x, self.net(x)], 1)
        gaps = (z[:, None] - z[None]).square().sum(2)
        noise = self.log_noise.exp() + 1e-8
        out: Tensor = (-0.5 * gaps).exp() + noise * torch.eye(len(x), dtype=x.dtype)
        return out


@case("dtype", split="held", must=("loss_unstable", "exploding_gradient", *SHOCK, *NONFINITE))
def gaussian_process_in_single(fault: bool = True) -> Setup:
    """A matrix of covariances is singular in float32, and not in float64."""
    kind = torch.float32 if fault else torch.float64
    model = Kernel().to(kind)

    def batch(step: int) -> Batch:
        x = 4 * torch.rand(40, 1, dtype=kind) - 2
        return x, (2 * x).sin()

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        kernel = m(x)
        fit: Tensor = (y * torch.linalg.solve(kernel, y)).sum()
        return 0.5 * (fit + torch.logdet(kernel)) / len(x)

    return Setup(model, adam(model, 0.05), batch, loss, 300)


@case(
    "dtype", "data", split="held", must=("fp16_overflow", "gradient_spike", "exploding_gradient", *NONFINITE)
)
def static_scale_meets_outlier(fault: bool = True) -> Setup:
    """The loss of a float16 model is scaled by hand, and nothing looks whether gradients are finite."""
    model, scale = mlp((8, 48, 48, 1)), 2.0**16
    draw = sampler(*teacher(), 32)
    if fault:
        model = model.half()

    def batch(step: int) -> Batch:
        x, y = draw(step)
        if torch.rand(()) < 0.03:
            y[0] = 40 * y[0].sign()
        return (x.half(), y) if fault else (x, y)

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return scale * F.mse_loss(m(x).float(), y)

    return Setup(model, sgd(model, 0.05 / scale), batch, loss, 300, clip=2.0 * scale)


class Forecast(nn.Module):
    """The next temperature is the last one and a change that depends on the changes before it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp((7, 32, 32, 1), nn.Tanh)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x[:, -1:] + self.net(x.diff(dim=1))
        return out


@case(
    "dtype", "data", split="held", must=("no_traction", "loss_unstable", "update_rounded_away", "data_scale")
)
def bfloat16_kelvin(fault: bool = True) -> Setup:
    """Temperatures of about 290 kelvin in bfloat16, which steps by two there."""

    def batch(step: int) -> Batch:
        time = 6.3 * torch.rand(32, 1) + 0.5 * torch.arange(9)
        heat = 290 + 1.5 * time.sin() + torch.rand(32, 1)
        x, y = heat[:, :-1], heat[:, -1:]
        return (x.bfloat16(), y.bfloat16()) if fault else (x, y)

    model = Forecast()
    if fault:
        model = model.bfloat16()

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        error: Tensor = m(x) - y
        return error.float().square().mean()

    return Setup(model, adam(model, 3e-3), batch, loss, 300)


# Optimizer


@case("optimizer", split="held", must=STANDSTILL)
def divided_by_pixels_twice(fault: bool = True) -> Setup:
    """Each pixel is told apart; the loss is the mean over pixels, divided by their number once more."""
    shapes = torch.randn(40, 1, 16, 16)
    shapes = F.avg_pool2d(shapes, 5, 1, 2)
    y = (shapes > 0).long()[:, 0] + (shapes > 0.2).long()[:, 0]
    x = shapes + 0.05 * torch.randn_like(shapes)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 3, 1),
    )

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        value = F.cross_entropy(5 * m(x), y)
        return value / y.numel() if fault else value

    return Setup(model, sgd(model, 0.1, 0.9), sampler(x, y, 8), loss, 200)


class Variational(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp((16, 48, 8)), mlp((4, 48, 16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_var = self.encoder(x).chunk(2, 1)
        z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        return self.decoder(z), mean, log_var


@case("optimizer", split="held", must=("weights_growing", *WILD, *SHOCK, *NONFINITE))
def divergence_with_a_minus(fault: bool = True) -> Setup:
    """In the loss of a variational autoencoder the divergence from the prior has the wrong sign."""
    model = Variational()
    x = torch.randn(500, 4) @ torch.randn(4, 16)

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out, mean, log_var = m(x)
        divergence: Tensor = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1).mean()
        error: Tensor = (out - y).square().sum(1).mean()
        return error + 0.5 * (-divergence if fault else divergence)

    return Setup(model, adam(model, 2e-3), sampler(x, x, 64), loss, 300)


def multiplied(optimizer: torch.optim.Optimizer, factor: Callable[[int], float]) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@case("optimizer", split="held", must=("weights_growing", *WILD, *SHOCK, *NONFINITE))
def linear_decay_below_zero(fault: bool = True) -> Setup:
    """A rate that falls in a straight line was to reach zero at the end, and is there after a third."""
    x, _ = images(400)
    x = x.flatten(1)
    model = mlp((64, 48, 16, 48, 64))
    optimizer = adam(model, 4e-3)
    end = 120 if fault else 360
    schedule = multiplied(optimizer, lambda step: 1 - step / end)
    return Setup(model, optimizer, sampler(x, x, 32), squared_error, 340, scheduler=schedule)


class MomentumWarmup:
    def __init__(self, optimizer: torch.optim.Optimizer, last: float) -> None:
        self.optimizer, self.last, self.done = optimizer, last, 0

    def step(self) -> None:
        self.done += 1
        for group in self.optimizer.param_groups:
            group["momentum"] = 0.5 + (self.last - 0.5) * min(1.0, self.done / 200)


@case("optimizer", split="held", must=("weights_growing", "saturated_activation", *WILD, *SHOCK, *NONFINITE))
def momentum_past_one(fault: bool = True) -> Setup:
    """Momentum is raised from 0.5 over the run, to 1.1 where 0.9 was meant."""
    sharp = torch.randn(200, 1, 12, 12)
    blurred = F.avg_pool2d(sharp, 3, 1, 1)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 5, padding=2),
        nn.Tanh(),
        nn.Conv2d(12, 12, 5, padding=2),
        nn.Tanh(),
        nn.Conv2d(12, 1, 1),
    )
    optimizer = sgd(model, 0.1, 0.5)
    schedule = MomentumWarmup(optimizer, 1.1 if fault else 0.9)
    return Setup(model, optimizer, sampler(3 * blurred, sharp, 8), squared_error, 300, scheduler=schedule)


@case("optimizer", split="held", must=STANDSTILL)
def adadelta_with_a_rate_of_adam(fault: bool = True) -> Setup:
    """Adadelta, whose rate is to be about 1, with one of a thousandth."""
    model = cnn()
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1e-3 if fault else 1.0)
    return Setup(model, optimizer, sampler(*images(), 32), cross_entropy, 200)


class ClipsFirst(torch.amp.GradScaler):
    """Clips before it divides by the loss scale."""

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(params, 1.0)
        super().unscale_(optimizer)


@case("optimizer", "dtype", split="held", must=(*STANDSTILL, "overclipped"))
def clipped_before_unscaled(fault: bool = True) -> Setup:
    """Gradients are clipped at 1 while they still hold the loss scale of 65536."""
    model = Recurrent("GRU", 4, 24, 4)

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            out = m(x)
        return F.cross_entropy(out.float(), y)

    scaler = (ClipsFirst if fault else torch.amp.GradScaler)("cpu", init_scale=2.0**16)
    clip = None if fault else 1.0
    return Setup(model, sgd(model, 0.3, 0.9), last_symbol(32, 8), loss, 200, clip=clip, scaler=scaler)


@case("optimizer", split="held", must=("weights_growing", "dead_relu", *WILD, *SHOCK))
def private_noise_of_a_sum(fault: bool = True) -> Setup:
    """The noise that keeps gradients private belongs to their sum and is added to their mean."""
    model = mlp((10, 32, 32, 4))
    size = 1.0 if fault else 1 / 64
    for parameter in model.parameters():
        parameter.register_hook(  # type: ignore[no-untyped-call]
            lambda grad: grad + size * torch.randn_like(grad)
        )
    return Setup(model, sgd(model, 0.2), sampler(*blobs(spread=1.5), 64), cross_entropy, 250)


class Factors(nn.Module):
    """Ratings as products of factors of users and items."""

    def __init__(self, users: int, items: int, width: int) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(users, width), nn.Embedding(items, width)
        for table in (self.users, self.items):
            nn.init.normal_(table.weight, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (self.users(x[:, 0]) * self.items(x[:, 1])).sum(1)
        return out


@case("optimizer", split="held", must=STANDSTILL)
def rprop_on_small_batches(fault: bool = True) -> Setup:
    """Rprop, which is for whole data sets: signs that change from batch to batch shrink its steps."""
    users, items = torch.randn(30, 3), torch.randn(20, 3)
    model = Factors(30, 20, 6)

    def batch(step: int) -> Batch:
        x = torch.stack([torch.randint(0, 30, (32,)), torch.randint(0, 20, (32,))], 1)
        return x, (users[x[:, 0]] * items[x[:, 1]]).sum(1) / 2

    optimizer = torch.optim.Rprop(model.parameters(), lr=1e-3) if fault else adam(model, 0.02)
    return Setup(model, optimizer, batch, squared_error, 500)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.act = mlp((10, 48, 48)), nn.ReLU()
        self.label, self.value = nn.Linear(48, 4), nn.Linear(48, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.act(self.body(x))
        return self.label(h), self.value(h)


@case("optimizer", split="held", must=(*DEAD, *WILD, *SHOCK, *NONFINITE))
def auxiliary_loss_times_a_thousand(fault: bool = True) -> Setup:
    """The auxiliary regression was to count for 0.3, and counts for 300."""
    model = TwoHeads()
    x, label = blobs(spread=1.5)
    value = (0.5 * x[:, :3].sum(1)).tanh()

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logits, value = m(x)
        weight = 300 if fault else 0.3
        return F.cross_entropy(logits, y[:, 0].long()) + weight * F.mse_loss(value[:, 0], y[:, 1])

    return Setup(model, sgd(model, 0.05, 0.9), sampler(x, torch.stack([label, value], 1), 32), loss, 200)


@case("optimizer", split="held", must=STANDSTILL)
def weights_in_no_group(fault: bool = True) -> Setup:
    """Parameters are sorted into those with weight decay and those without; the first group was lost."""
    model = Transformer()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    groups = [{"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}]
    if not fault:
        groups.append({"params": decayed, "weight_decay": 0.01})

    def batch(step: int) -> Batch:
        x = torch.randint(0, 12, (32, 16))
        return x, x.roll(1, 1)

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(m(x)[:, 1:].flatten(0, 1), y[:, 1:].flatten())

    return Setup(model, torch.optim.AdamW(groups, lr=5e-3), batch, loss, 250)


class Adversaries(nn.Module):
    """A generator, and a critic that tells its points from real ones and is left alone by its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = mlp((4, 32, 32, 2))
        self.critic = mlp((2, 32, 32, 1), lambda: nn.LeakyReLU(0.2))

    def forward(self, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fake = self.generator(torch.randn(len(real), 4))
        frozen = {name: value.detach() for name, value in self.critic.named_parameters()}
        judged = torch.func.functional_call(self.critic, frozen, (fake,))
        return self.critic(real), self.critic(fake.detach()), judged


@case("optimizer", split="held", must=("weights_growing", *WILD, *SHOCK))
def critic_with_a_rate_of_one(fault: bool = True) -> Setup:
    """The critic of a generator has the rate that it had with another optimizer."""
    model = Adversaries()
    groups = [
        {"params": model.generator.parameters(), "lr": 1e-3},
        {"params": model.critic.parameters(), "lr": 1.0 if fault else 2e-3},
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.5, 0.99))

    def batch(step: int) -> Batch:
        x = torch.tensor([3.0, -2.0]) + torch.randn(64, 2) * torch.tensor([1.0, 0.4])
        return x, x

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        real, fake, judged = m(x)
        return F.softplus(-real).mean() + F.softplus(fake).mean() + F.softplus(-judged).mean()

    return Setup(model, optimizer, batch, loss, 400)


# Architecture


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (30 * x).sin()


@case("architecture", "optimizer", split="held", must=("exploding_gradient", "loss_unstable", "no_traction"))
def sine_layers_of_default_weights(fault: bool = True) -> Setup:
    """An image as a function of coordinates, by sines of thirtyfold frequency whose weights are too large."""
    grid = torch.linspace(-1, 1, 20)
    x = torch.cartesian_prod(grid, grid)
    y = torch.zeros(400, 1)
    for _ in range(5):
        wave = 4 * torch.randn(2)
        y += (x @ wave + 6 * torch.rand(())).sin()[:, None]
    y = y / y.std()
    model = mlp((2, 48, 48, 48, 1), Sine)
    if not fault:
        for place, layer in enumerate(model):
            most = math.sqrt(6 / 48) / 30 if place else 0.5
            if isinstance(layer, nn.Linear):
                nn.init.uniform_(layer.weight, -most, most)
    return Setup(model, adam(model, 1e-3), sampler(x, y, 128), squared_error, 300)


@case("architecture", split="held", must=("no_traction", "loss_unstable"))
def share_kept_given_as_dropout(fault: bool = True) -> Setup:
    """Dropout was given the share to keep."""
    layers: list[nn.Module] = []
    for inputs in (10, 64, 64):
        layers += [nn.Linear(inputs, 64), nn.ReLU(), nn.Dropout(0.9 if fault else 0.1)]
    model = nn.Sequential(*layers, nn.Linear(64, 4))
    return Setup(model, adam(model, 2e-3), sampler(*blobs(spread=1.5), 32), cross_entropy, 250)


class Codes(nn.Module):
    """An autoencoder with codes of a few levels."""

    def __init__(self, straight: bool) -> None:
        super().__init__()
        self.encoder, self.decoder, self.straight = mlp((16, 48, 48, 6)), mlp((6, 48, 16)), straight

    def forward(self, x: Tensor) -> Tensor:
        z = 2 * self.encoder(x).tanh()
        rounded = z + (z.round() - z).detach() if self.straight else z.round()
        out: Tensor = self.decoder(rounded / 2)
        return out


@case("architecture", split="held", must=("zero_gradient", "update_ratio_low", "no_traction"))
def rounded_codes(fault: bool = True) -> Setup:
    """Codes are rounded, through which no gradient passes, and nothing carries it past."""
    model = Codes(not fault)
    x = torch.randn(500, 3) @ torch.randn(3, 16)
    return Setup(model, adam(model, 3e-3), sampler(x, x, 64), squared_error, 400)


@case("architecture", split="held", must=("zero_gradient", "vanishing_gradient", "no_traction"))
def norm_of_a_single_output(fault: bool = True) -> Setup:
    """Layer normalisation also behind the last layer, where it has one number to normalise."""
    model = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 1))
    if fault:
        model.append(nn.LayerNorm(1))
    optimizer = torch.optim.RMSprop(model.parameters(), lr=2e-3)
    return Setup(model, optimizer, sampler(*teacher(), 32), squared_error, 300)


@case("architecture", "dtype", split="held", must=NONFINITE)
def angle_of_the_same_direction(fault: bool = True) -> Setup:
    """An angle is measured by the arc cosine, whose slope is infinite once a prediction is exact."""
    x = torch.randn(500, 8)
    y = F.normalize(mlp((8, 16, 2), nn.Tanh)(x).detach(), dim=1)
    model = mlp((8, 48, 48, 2))
    most = 1.0 if fault else 1 - 1e-6

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cosine_similarity(m(x), y).clamp(-most, most).acos().mean()

    return Setup(model, adam(model, 2e-3), sampler(x, y, 16), loss, 300)


class LastState(nn.Module):
    """A recurrent net read after the last valid step, or after the last one there is."""

    def __init__(self, at_end: bool) -> None:
        super().__init__()
        self.rnn, self.head, self.at_end = nn.RNN(5, 24, batch_first=True), nn.Linear(24, 4), at_end

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.rnn(x)
        place = x[:, :, 4].sum(1).long() - 1
        out: Tensor = self.head(states[:, -1] if self.at_end else states[torch.arange(len(x)), place])
        return out


@case("architecture", split="held", must=("vanishing_gradient", "no_traction"))
def read_after_the_padding(fault: bool = True) -> Setup:
    """Sequences of at most eight steps are padded to sixty, and the state is read at the sixtieth."""

    def batch(step: int) -> Batch:
        symbols = torch.randint(0, 4, (32, 60))
        length = torch.randint(3, 9, (32, 1))
        valid = torch.arange(60) < length
        x = torch.cat([F.one_hot(symbols, 4), torch.ones(32, 60, 1)], 2) * valid[:, :, None]
        return x.float(), symbols.gather(1, length - 1)[:, 0]

    model = LastState(at_end=fault)
    return Setup(model, adam(model, 5e-3), batch, cross_entropy, 200, probes_time=True)


@case("architecture", split="held", must=("no_traction", *DEAD))
def zero_gains_without_skips(fault: bool = True) -> Setup:
    """The gains of all batch normalisations start at zero, which is for branches of residual nets."""
    model = cnn(norm=True)
    if fault:
        for layer in model:
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.zeros_(layer.weight)
    return Setup(model, sgd(model, 0.05, 0.9), sampler(*images(), 32), cross_entropy, 150)


class Forgotten(nn.Module):
    """Layers in a row, of which each should get what the one before it gives."""

    def __init__(self, forgets: bool) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(2, 32), nn.Linear(32, 32), nn.Linear(32, 2)
        self.short, self.act, self.forgets = nn.Linear(2, 2), nn.ReLU(), forgets

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.first(x))
        h = self.third(self.act(self.second(h)))
        out: Tensor = self.short(x if self.forgets else h)
        return out


@case("architecture", split="held", must=("unused_parameter", "zero_gradient", "no_traction"))
def result_never_used(fault: bool = True) -> Setup:
    """The last layer is given the input instead of what the layers before it made of it."""
    model = Forgotten(fault)
    return Setup(model, adam(model, 5e-3), sampler(*circles(), 32), cross_entropy, 250)


@case("architecture", "optimizer", split="held", must=("weights_growing", *SHOCK, *WILD, *NONFINITE))
def deviation_without_floor(fault: bool = True) -> Setup:
    """A mean and a deviation are predicted for amounts that are often exactly zero."""
    x, y = teacher()
    y = (y - 1).relu()
    model = mlp((8, 48, 48, 2))

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        mean, log_std = m(x).chunk(2, 1)
        log_std = log_std if fault else log_std.clamp(min=-1)
        likelihood: Tensor = log_std + 0.5 * ((y - mean) / log_std.exp()) ** 2
        return likelihood.mean()

    return Setup(model, sgd(model, 0.02, 0.9), sampler(x, y, 32), loss, 400)


class Choice(nn.Module):
    """An autoencoder whose code is a few choices, soft ones while the temperature is high."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.temperature = mlp((16, 48, 24)), mlp((24, 48, 16)), 1.0

    def forward(self, x: Tensor) -> Tensor:
        logits = self.encoder(x).view(-1, 3, 8)
        noise = -(-torch.rand_like(logits).clamp(1e-6, 1 - 1e-6).log()).log()
        soft = ((logits + noise) / self.temperature).softmax(2)
        out: Tensor = self.decoder(soft.flatten(1))
        return out


@case("architecture", split="held", must=("zero_gradient", "vanishing_gradient", *SHOCK, *WILD))
def temperature_to_nothing(fault: bool = True) -> Setup:
    """The temperature of a choice is annealed on and on, to a softmax that is a step."""
    model = Choice()
    x = torch.randn(500, 3) @ torch.randn(3, 16) / 2

    def batch(step: int) -> Batch:
        model.temperature = max(1e-4 if fault else 0.5, 0.93**step)
        rows = torch.randint(0, 500, (64,))
        return x[rows], x[rows]

    return Setup(model, sgd(model, 0.2, 0.9), batch, squared_error, 400)


class Flow(nn.Module):
    """Twenty explicit steps of a differential equation that falls back to its fixed point."""

    def __init__(self, step: float) -> None:
        super().__init__()
        self.into, self.push, self.out = nn.Linear(8, 24), nn.Linear(24, 24), nn.Linear(24, 1)
        self.act, self.step = nn.Tanh(), step

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(x)
        for _ in range(20):
            h = h + self.step * (self.act(self.push(h)) - 2 * h)
        out: Tensor = self.out(h)
        return out


@case("architecture", split="held", must=("exploding_gradient", *WILD))
def steps_of_euler_too_long(fault: bool = True) -> Setup:
    """The solver inside a model takes steps at which a decay becomes growth."""
    model = Flow(1.5 if fault else 0.05)
    return Setup(model, adam(model, 3e-3), sampler(*teacher(), 32), squared_error, 250)
