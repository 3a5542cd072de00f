"""The labelled suite: small training runs of which it is known what is wrong with them, or that nothing is.

Each case is a family of runs: a seed makes one. Those here and in `user_faults` were looked at while
thresholds were chosen ("tune"); those of `held_faults` and `held_healthy` were not ("held").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.diagnosis.runs import Batch, Setup

Builder = Callable[[], Setup]


@dataclass(frozen=True)
class Case:
    """A family of runs.

    Attributes:
        causes: categories of which one must be the root cause; None where no single cause is right too; empty
            for a healthy run.
        must: kinds of which at least one must be an alarm.
        must_not: kinds that must not be alarms, whatever is wrong.
        source: who described the fault: "own", "article", "autotrainer", "deepchecker".
        twin: the broken case that this one repairs.
        outcome: of a healthy run, what shows that it is one: it "learns", or "stays" where it began.
    """

    name: str
    build: Builder
    causes: tuple[str | None, ...] = ()
    must: tuple[str, ...] = ()
    must_not: tuple[str, ...] = ()
    split: str = "tune"
    source: str = "own"
    twin: str = ""
    outcome: str = "learns"
    slow: bool = False

    @property
    def is_healthy(self) -> bool:
        return not self.causes


CASES: dict[str, Case] = {}


def case(*causes: str | None, split: str = "tune", **options: Any) -> Callable[[Builder], Builder]:
    """Register the function below as a case of its name."""

    def register(build: Builder) -> Builder:
        name = build.__name__
        if name in CASES:
            raise ValueError(f"there are two cases of the name {name}")
        CASES[name] = Case(name, build, causes, split=split, **options)
        return build

    return register


def make(name: str, seed: int) -> Setup:
    """The run of a case with a seed: the same numbers every time."""
    torch.manual_seed(
        100_003 * seed + sum(ord(letter) * 31**place for place, letter in enumerate(name[:9])) % 99_991
    )
    return CASES[name].build()


# Data


def sampler(x: Tensor, y: Tensor, batch: int) -> Callable[[int], Batch]:
    def draw(step: int) -> Batch:
        picked = torch.randint(0, len(x), (batch,))
        return x[picked], y[picked]

    return draw


def blobs(count: int = 400, classes: int = 4, inputs: int = 10, spread: float = 1.0) -> Batch:
    centres = 2 * torch.randn(classes, inputs)
    y = torch.randint(0, classes, (count,))
    return centres[y] + spread * torch.randn(count, inputs), y


def circles(count: int = 400) -> Batch:
    """Two rings in the plane, the inner one of half the radius."""
    y = torch.randint(0, 2, (count,))
    angle = 2 * math.pi * torch.rand(count)
    radius = 1.0 - 0.5 * y + 0.05 * torch.randn(count)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), y


def moons(count: int = 400) -> Batch:
    y = torch.randint(0, 2, (count,))
    angle = math.pi * torch.rand(count)
    x = torch.stack([angle.cos() * (1 - 2 * y) + y, angle.sin() * (1 - 2 * y) + 0.5 * y], 1)
    return x + 0.1 * torch.randn(count, 2), y


def images(count: int = 300, classes: int = 4, size: int = 8) -> Batch:
    templates = torch.randn(classes, 1, size, size)
    y = torch.randint(0, classes, (count,))
    return templates[y] + 0.7 * torch.randn(count, 1, size, size), y


def regression(count: int = 500, inputs: int = 20, informative: int = 10, scale: float = 1.0) -> Batch:
    x = torch.randn(count, inputs)
    weight = torch.zeros(inputs)
    weight[:informative] = 100 * torch.rand(informative)
    y = (x @ weight + 0.1 * torch.randn(count)).unsqueeze(1)
    return x, scale * y / (y.std() if scale == 1.0 else 1.0)


def teacher(count: int = 500, inputs: int = 8) -> Batch:
    net = nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.randn(count, inputs)
    with torch.no_grad():
        y = net(x)
    return x, (y - y.mean()) / y.std() + 0.1 * torch.randn(count, 1)


def adding(batch: int, length: int) -> Callable[[int], Batch]:
    """The sum of the two marked numbers of a sequence."""

    def draw(step: int) -> Batch:
        numbers = torch.rand(batch, length)
        marks = torch.zeros(batch, length)
        first = torch.randint(0, length // 2, (batch,))
        second = torch.randint(length // 2, length, (batch,))
        rows = torch.arange(batch)
        marks[rows, first] = 1
        marks[rows, second] = 1
        return torch.stack([numbers, marks], 2), (numbers * marks).sum(1, keepdim=True)

    return draw


def last_symbol(batch: int, length: int, classes: int = 4) -> Callable[[int], Batch]:
    """Which symbol was seen most in the last three steps: short memory is enough."""

    def draw(step: int) -> Batch:
        symbols = torch.randint(0, classes, (batch, length))
        return F.one_hot(symbols, classes).float(), symbols[:, -1]

    return draw


def markov(batch: int, length: int, symbols: int = 12) -> Callable[[int], Batch]:
    """Sequences of a chain in which each symbol has three likely successors; the target is the next one."""
    matrix = torch.rand(symbols, symbols) * 0.02
    for row in range(symbols):
        matrix[row, torch.randperm(symbols)[:3]] += torch.tensor([0.6, 0.3, 0.1])
    matrix = matrix / matrix.sum(1, keepdim=True)

    def draw(step: int) -> Batch:
        found = [torch.randint(0, symbols, (batch,))]
        for _ in range(length):
            found.append(torch.multinomial(matrix[found[-1]], 1).squeeze(1))
        tokens = torch.stack(found, 1)
        return tokens[:, :-1], tokens[:, 1:]

    return draw


# Models and losses


def mlp(
    sizes: tuple[int, ...],
    activation: Callable[[], nn.Module] = nn.ReLU,
    *,
    gain: float | None = None,
    norm: Callable[[int], nn.Module] | None = None,
) -> nn.Sequential:
    """A multilayer perceptron; with `gain`, weights of deviation gain / sqrt(inputs) and biases of 0."""
    layers: list[nn.Module] = []
    for place, (inputs, outputs) in enumerate(pairwise(sizes)):
        linear = nn.Linear(inputs, outputs)
        if gain is not None:
            nn.init.normal_(linear.weight, std=gain / math.sqrt(inputs))
            nn.init.zeros_(linear.bias)
        layers.append(linear)
        if place < len(sizes) - 2:
            layers += [norm(outputs)] if norm else []
            layers.append(activation())
    return nn.Sequential(*layers)


class Exponential(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


class Residual(nn.Module):
    def __init__(self, width: int, norm: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.up, self.act, self.down = nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


class Recurrent(nn.Module):
    """A recurrent net over float sequences or tokens, read at the last step or at every one."""

    def __init__(
        self, kind: str, inputs: int, hidden: int, outputs: int, *, tokens: bool = False, every: bool = False
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(inputs, hidden) if tokens else None
        self.rnn = getattr(nn, kind)(hidden if tokens else inputs, hidden, batch_first=True)
        self.head = nn.Linear(hidden, outputs)
        self.every = every

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.rnn(self.embed(x) if self.embed is not None else x)
        return self.head(states if self.every else states[:, -1])


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width) if norm else nn.Identity()
        self.norm2 = nn.LayerNorm(width) if norm else nn.Identity()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.act, self.down = nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.out(mixed)
        return x + self.down(self.act(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(
        self, symbols: int = 12, width: int = 24, blocks: int = 2, length: int = 16, norm: bool = True
    ) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(symbols, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Attention(width, 2, norm) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        return self.head(self.norm(self.blocks(self.embed(x) + self.place(places))))


def cnn(classes: int = 4, norm: bool = False) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        *([nn.BatchNorm2d(8)] if norm else []),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, stride=2),
        *([nn.BatchNorm2d(16)] if norm else []),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, classes),
    )


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = model(x)
    return F.cross_entropy(out.reshape(-1, out.shape[-1]), y.reshape(-1))


def squared_error(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(model(x), y)


def sgd(model: nn.Module, lr: float, momentum: float = 0.0, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, **options)


def adam(model: nn.Module, lr: float = 1e-3, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=lr, **options)


# Healthy runs


@case()
def healthy_mlp_adam() -> Setup:
    model = mlp((10, 32, 32, 4))
    return Setup(model, adam(model, 3e-3), sampler(*blobs(), 32), cross_entropy)


@case()
def healthy_mlp_sgd_momentum() -> Setup:
    model = mlp((2, 32, 32, 2))
    return Setup(model, sgd(model, 0.1, 0.9), sampler(*moons(), 32), cross_entropy, 300)


@case()
def healthy_batch_of_one() -> Setup:
    model = mlp((10, 16, 4))
    return Setup(model, sgd(model, 0.01), sampler(*blobs(spread=2.0), 1), cross_entropy, 600)


@case()
def healthy_batch_of_two_regression() -> Setup:
    model = mlp((8, 32, 1), nn.Tanh)
    return Setup(model, sgd(model, 0.01), sampler(*teacher(), 2), squared_error, 600)


@case()
def healthy_sum_reduced_loss() -> Setup:
    model = mlp((10, 32, 4))
    return Setup(
        model,
        sgd(model, 0.1 / 64),
        sampler(*blobs(spread=2.0), 64),
        lambda m, x, y: F.cross_entropy(m(x), y, reduction="sum"),
        300,
    )


@case()
def healthy_sum_reduced_autoencoder() -> Setup:
    model = mlp((16, 32, 6, 32, 16))
    x = torch.randn(400, 6) @ torch.randn(6, 16) / 2
    return Setup(
        model, adam(model, 2e-3), sampler(x, x, 64), lambda m, x, y: F.mse_loss(m(x), y, reduction="sum"), 300
    )


@case()
def healthy_converged() -> Setup:
    model = mlp((10, 64, 4))
    return Setup(model, adam(model, 0.01), sampler(*blobs(100, spread=0.3), 16), cross_entropy, 1500)


@case()
def healthy_converged_regression() -> Setup:
    model = nn.Linear(20, 1)
    return Setup(model, sgd(model, 0.05), sampler(*regression(), 32), squared_error, 1000)


@case()
def healthy_frozen_backbone() -> Setup:
    model = mlp((10, 64, 64, 4))
    for layer in model[:4]:
        layer.requires_grad_(False)
    return Setup(
        model,
        torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3),
        sampler(*blobs(), 32),
        cross_entropy,
    )


@case()
def healthy_detached_backbone() -> Setup:
    model = nn.Sequential(mlp((10, 64, 64)), nn.ReLU(), nn.Linear(64, 4))
    return Setup(
        model,
        adam(model, 3e-3),
        sampler(*blobs(), 32),
        lambda m, x, y: F.cross_entropy(m[2](m[1](m[0](x)).detach()), y),
    )


@case()
def healthy_embedding_bag() -> Setup:
    model = nn.Sequential(nn.EmbeddingBag(500, 16), nn.Linear(16, 4))
    tokens = torch.randint(0, 500, (400, 6))
    y = tokens[:, 0] % 4
    tokens[:, 1:3] = y.unsqueeze(1) + 4 * torch.randint(0, 100, (400, 2))
    return Setup(model, adam(model, 0.01), sampler(tokens, y, 16), cross_entropy, 300)


@case()
def healthy_cnn() -> Setup:
    model = cnn()
    return Setup(model, adam(model, 1e-3), sampler(*images(), 32), cross_entropy, 150)


@case()
def healthy_cnn_batchnorm() -> Setup:
    model = cnn(norm=True)
    return Setup(model, sgd(model, 0.05, 0.9), sampler(*images(), 32), cross_entropy, 150)


@case()
def healthy_unscaled_inputs_with_batchnorm() -> Setup:
    x, y = images()
    model = nn.Sequential(nn.BatchNorm2d(1), *cnn(norm=True))
    return Setup(model, sgd(model, 0.05, 0.9), sampler(128 + 60 * x, y, 32), cross_entropy, 150)


@case()
def healthy_lstm() -> Setup:
    model = Recurrent("LSTM", 4, 24, 4)
    return Setup(model, adam(model, 0.01), last_symbol(32, 12), cross_entropy, 150, probes_time=True)


@case()
def healthy_gru_clipped_always() -> Setup:
    model = Recurrent("GRU", 12, 24, 12, tokens=True, every=True)
    return Setup(model, adam(model, 0.01), markov(16, 16), cross_entropy, 200, clip=0.1, probes_time=True)


@case()
def healthy_rnn_clipped() -> Setup:
    model = Recurrent("RNN", 12, 32, 12, tokens=True, every=True)
    return Setup(model, sgd(model, 0.5, 0.5), markov(16, 20), cross_entropy, 250, clip=0.25, probes_time=True)


@case()
def healthy_transformer_warmup() -> Setup:
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 40, 0.5 * (1 + math.cos(math.pi * step / 250)))
    )
    return Setup(model, optimizer, markov(16, 16), cross_entropy, 220, clip=1.0, scheduler=schedule)


@case()
def healthy_transformer_deep() -> Setup:
    model = Transformer(blocks=6, width=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    return Setup(model, optimizer, markov(16, 16), cross_entropy, 120, clip=1.0)


@case()
def healthy_lr_drops() -> Setup:
    model = mlp((10, 32, 32, 4))
    optimizer = sgd(model, 0.03, 0.9)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [150, 250], gamma=0.1)
    return Setup(model, optimizer, sampler(*blobs(spread=2.0), 32), cross_entropy, 350, scheduler=schedule)


@case()
def healthy_warm_restarts() -> Setup:
    model = mlp((8, 32, 1))
    optimizer = sgd(model, 0.1, 0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 80)
    return Setup(model, optimizer, sampler(*teacher(), 16), squared_error, 320, scheduler=schedule)


@case()
def healthy_scaler_backoff() -> Setup:
    """A real GradScaler whose first scale overflows float32, and which doubles it every 40 steps."""
    model = mlp((10, 32, 4))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=40)
    return Setup(model, adam(model, 3e-3), sampler(*blobs(), 32), cross_entropy, 250, scaler=scaler)


@case()
def healthy_scaler_sgd() -> Setup:
    model = mlp((2, 32, 2), nn.Tanh)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=60)
    return Setup(model, sgd(model, 0.1, 0.9), sampler(*moons(), 32), cross_entropy, 250, scaler=scaler)


@case()
def healthy_sparse_relu() -> Setup:
    model = mlp((10, 256, 256, 4))
    with torch.no_grad():
        model[0].bias.fill_(-1.0)
    return Setup(model, adam(model, 2e-3), sampler(*blobs(), 8), cross_entropy)


@case()
def healthy_outliers() -> Setup:
    x, y = blobs(spread=1.5)
    x[::67] *= 8
    model = mlp((10, 32, 4))
    return Setup(model, adam(model, 2e-3), sampler(x, y, 16), cross_entropy, 500)


@case()
def healthy_heavy_tailed_targets() -> Setup:
    x, y = teacher()
    y = y + 0.3 * torch.distributions.StudentT(2.0).sample(y.shape)
    model = mlp((8, 32, 1))
    return Setup(model, adam(model, 3e-3), sampler(x, y, 16), lambda m, x, y: F.smooth_l1_loss(m(x), y), 400)


@case()
def healthy_deep_residual() -> Setup:
    model = nn.Sequential(
        nn.Linear(10, 32), *(Residual(32) for _ in range(12)), nn.LayerNorm(32), nn.Linear(32, 4)
    )
    return Setup(model, adam(model, 1e-3), sampler(*blobs(), 32), cross_entropy, 120)


@case()
def healthy_deep_batchnorm() -> Setup:
    model = mlp((10, *[32] * 8, 4), norm=nn.BatchNorm1d)
    return Setup(model, adam(model, 2e-3), sampler(*blobs(), 32), cross_entropy, 150)


@case()
def healthy_deep_kaiming() -> Setup:
    model = mlp((10, *[48] * 10, 4), gain=math.sqrt(2))
    return Setup(model, adam(model, 1e-3), sampler(*blobs(), 32), cross_entropy, 150)


@case()
def healthy_deep_default_init() -> Setup:
    """torch's own initialisation loses gradients through six ReLU layers, and gets going all the same."""
    model = mlp((10, *[48] * 6, 4))
    return Setup(model, adam(model, 2e-3), sampler(*blobs(), 32), cross_entropy, 250)


@case()
def healthy_noisy_labels() -> Setup:
    x, y = blobs()
    y[::3] = torch.randint(0, 4, y[::3].shape)
    model = mlp((10, 32, 4))
    return Setup(model, sgd(model, 0.1), sampler(x, y, 16), cross_entropy, 400)


@case()
def healthy_zero_head() -> Setup:
    model = mlp((10, 32, 32, 4))
    nn.init.zeros_(model[-1].weight)
    return Setup(model, adam(model, 3e-3), sampler(*blobs(), 32), cross_entropy)


@case()
def healthy_dropout() -> Setup:
    model = nn.Sequential(
        nn.Linear(10, 64),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(64, 4),
    )
    return Setup(model, adam(model, 2e-3), sampler(*blobs(), 16), cross_entropy, 300)


@case()
def healthy_negative_loss() -> Setup:
    """A likelihood of a density: it goes below zero."""
    model = mlp((8, 32, 2))
    x, y = teacher()

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        mean, log_std = m(x).chunk(2, 1)
        log_std = log_std.clamp(-3, 3)
        return (log_std + 0.5 * ((0.05 * y - mean) / log_std.exp()) ** 2).mean()

    return Setup(model, adam(model, 3e-3), sampler(x, y, 32), loss, 400, clip=1.0)


@case()
def healthy_imbalanced() -> Setup:
    x, _ = blobs(600, 2)
    y = (torch.rand(600) < 0.03).long()
    x[y == 1] += 1.5
    model = mlp((10, 32, 2))
    return Setup(model, adam(model, 3e-3), sampler(x, y, 16), cross_entropy, 500)


@case(outcome="stays")
def healthy_finetuned() -> Setup:
    """Goes on from a solution: the loss is low from the first step on and stays there."""
    model = mlp((10, 32, 4))
    x, y = blobs(spread=2.5)
    optimizer = adam(model, 5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        cross_entropy(model, x, y).backward()
        optimizer.step()
    return Setup(model, adam(model, 1e-5), sampler(x, y, 256), cross_entropy, 250)


@case()
def healthy_bfloat16() -> Setup:
    model = mlp((10, 32, 32, 4)).bfloat16()
    x, y = blobs()
    return Setup(model, sgd(model, 0.1), sampler(x.bfloat16(), y, 32), cross_entropy, 200)


@case()
def healthy_float16_scaled_loss() -> Setup:
    """Float16 weights and gradients of ordinary size."""
    model = mlp((10, 32, 4)).half()
    x, y = blobs()
    return Setup(model, sgd(model, 0.1), sampler(x.half(), y, 32), cross_entropy, 200)


@case()
def healthy_contrastive() -> Setup:
    model = mlp((10, 32, 8))
    x, _ = blobs()

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        a = F.normalize(m(x + 0.3 * torch.randn_like(x)), dim=1)
        b = F.normalize(m(x + 0.3 * torch.randn_like(x)), dim=1)
        return F.cross_entropy(a @ b.T / 0.2, torch.arange(len(x)))

    return Setup(model, adam(model, 3e-3), sampler(x, x, 32), loss, 250)


@case(slow=True)
def healthy_long_classifier() -> Setup:
    model = mlp((10, 16, 4))
    return Setup(model, adam(model, 2e-3), sampler(*blobs(spread=2.5), 8), cross_entropy, 20_000)


@case(slow=True)
def healthy_long_regression() -> Setup:
    model = mlp((8, 16, 1), nn.Tanh)
    return Setup(model, sgd(model, 0.02, 0.9), sampler(*teacher(), 4), squared_error, 20_000)


@case(slow=True)
def healthy_long_rnn() -> Setup:
    model = Recurrent("RNN", 4, 8, 4)
    return Setup(model, sgd(model, 0.05, 0.9), last_symbol(8, 6), cross_entropy, 20_000, clip=1.0)


@case(slow=True)
def healthy_long_separable() -> Setup:
    """Interpolates its data: gradients and losses over many orders of magnitude."""
    model = mlp((2, 24, 2))
    return Setup(model, sgd(model, 0.05, 0.9), sampler(*moons(), 8), cross_entropy, 20_000)


# Exploding gradients


@case("architecture", must=("exploding_gradient",), source="article")
def exploding_depth_relu() -> Setup:
    model = mlp((10, *[32] * 15, 4), gain=3.0)
    return Setup(model, sgd(model, 0.01), sampler(*blobs(), 32), cross_entropy)


@case("architecture", must=("exploding_gradient",), source="article")
def exploding_depth_regression() -> Setup:
    model = mlp((8, *[24] * 12, 1), gain=3.2)
    return Setup(model, sgd(model, 0.001, 0.9), sampler(*teacher(), 32), squared_error)


@case("architecture", must=("exploding_gradient",))
def exploding_depth_cnn() -> Setup:
    layers: list[nn.Module] = []
    for place in range(9):
        layers += [nn.Conv2d(8 if place else 1, 8, 3, padding=1), nn.ReLU()]
        nn.init.normal_(layers[-2].weight, std=3.0 / math.sqrt(72 if place else 9))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 4))
    return Setup(model, sgd(model, 0.01), sampler(*images(), 16), cross_entropy, 100)


@case("architecture", must=("exploding_gradient",), source="article")
def exploding_rnn() -> Setup:
    model = Recurrent("RNN", 2, 24, 1)
    nn.init.normal_(model.rnn.weight_hh_l0, std=0.1 / math.sqrt(24))
    with torch.no_grad():
        model.rnn.weight_hh_l0 += 1.45 * torch.eye(24)
        model.rnn.weight_ih_l0 *= 0.02
        model.rnn.bias_ih_l0.zero_()
        model.rnn.bias_hh_l0.zero_()
    model.rnn.nonlinearity = "relu"
    model.rnn.mode = "RNN_RELU"
    return Setup(model, sgd(model, 0.01), adding(20, 30), squared_error, 150, probes_time=True)


@case("architecture", must=("exploding_gradient",), source="article")
def exploding_rnn_tokens() -> Setup:
    model = Recurrent("RNN", 12, 24, 12, tokens=True)
    model.rnn.nonlinearity, model.rnn.mode = "relu", "RNN_RELU"
    nn.init.orthogonal_(model.rnn.weight_hh_l0, gain=2.2)

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(m(x), y[:, -1])

    return Setup(model, sgd(model, 0.05), markov(16, 24), loss, 150, probes_time=True)


@case("data", must=("exploding_gradient", "loss_nonfinite"), source="article")
def exploding_unscaled_targets() -> Setup:
    """The regression of the article's sequel."""
    x, y = regression(scale=2.0)
    model = mlp((20, 25, 1))
    nn.init.kaiming_uniform_(model[0].weight, nonlinearity="relu")
    return Setup(model, sgd(model, 0.01, 0.9), sampler(x, y, 32), squared_error, 100)


@case("data", must=("exploding_gradient", "loss_nonfinite", "loss_diverging", "loss_unstable"))
def exploding_large_targets() -> Setup:
    x, y = teacher()
    model = mlp((8, 48, 48, 1))
    return Setup(model, sgd(model, 0.01, 0.9), sampler(x, 2000 + 800 * y, 16), squared_error, 150)


# Learning rate and optimizer

LR_SIGNS = (
    "loss_nonfinite",
    "loss_diverging",
    "loss_unstable",
    "exploding_gradient",
    "update_ratio_high",
    "no_traction",
)


@case("optimizer", must=LR_SIGNS)
def lr_high_sgd() -> Setup:
    model = mlp((8, 32, 1))
    return Setup(model, sgd(model, 2.0, 0.9), sampler(*teacher(), 32), squared_error)


@case("optimizer", must=LR_SIGNS)
def lr_high_sgd_classifier() -> Setup:
    model = mlp((10, 32, 32, 4))
    return Setup(model, sgd(model, 30.0), sampler(*blobs(spread=2.0), 32), cross_entropy)


@case("optimizer", must=LR_SIGNS)
def lr_high_adam() -> Setup:
    model = mlp((10, 32, 32, 4))
    return Setup(model, adam(model, 1.0), sampler(*blobs(spread=2.0), 32), cross_entropy)


@case("optimizer", must=LR_SIGNS)
def lr_high_adam_cnn() -> Setup:
    model = cnn()
    return Setup(model, adam(model, 0.5), sampler(*images(), 32), cross_entropy, 150)


@case("optimizer", must=LR_SIGNS)
def lr_high_transformer() -> Setup:
    model = Transformer()
    return Setup(model, adam(model, 0.3), markov(16, 16), cross_entropy, 150)


@case("optimizer", must=LR_SIGNS)
def lr_high_lstm() -> Setup:
    model = Recurrent("LSTM", 2, 16, 1)
    return Setup(model, sgd(model, 20.0), adding(20, 20), squared_error, 150, probes_time=True)


@case("optimizer", must=LR_SIGNS)
def no_zero_grad() -> Setup:
    """`zero_grad` forgotten: gradients add up."""
    model = mlp((8, 32, 1))
    return Setup(model, sgd(model, 0.05), sampler(*teacher(), 32), squared_error, 300, zero_grad=False)


@case("optimizer", must=("update_spike", "gradient_spike", "loss_spike", *LR_SIGNS))
def lr_jump() -> Setup:
    model = mlp((8, 32, 1))
    optimizer = sgd(model, 0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 200.0 if 150 <= step < 153 else 1.0)
    return Setup(model, optimizer, sampler(*teacher(), 32), squared_error, 250, scheduler=schedule)


@case("optimizer", must=("update_spike", "gradient_spike", "loss_spike", *LR_SIGNS))
def lr_schedule_grows() -> Setup:
    """The schedule is inverted: the rate grows without end."""
    model = mlp((10, 32, 4))
    optimizer = sgd(model, 0.01, 0.9)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 1.05)
    return Setup(model, optimizer, sampler(*blobs(spread=2.0), 32), cross_entropy, 250, scheduler=schedule)


@case("optimizer", must=("update_ratio_low",))
def lr_low_sgd() -> Setup:
    model = mlp((10, 32, 4))
    return Setup(model, sgd(model, 1e-7), sampler(*blobs(), 64), cross_entropy, 300)


@case("optimizer", must=("update_ratio_low",))
def lr_low_adam() -> Setup:
    model = cnn()
    return Setup(model, adam(model, 1e-8), sampler(*images(), 64), cross_entropy, 150)


@case("optimizer", must=("loss_diverging",), source="deepchecker")
def flipped_sign_maximize() -> Setup:
    model = mlp((10, 32, 4))
    return Setup(model, sgd(model, 0.01, maximize=True), sampler(*blobs(), 32), cross_entropy, 300)


@case("optimizer", must=("loss_diverging",), source="deepchecker")
def flipped_sign_loss() -> Setup:
    """The minus of the cross-entropy is missing."""
    model = mlp((10, 32, 4))
    return Setup(
        model, adam(model, 1e-2), sampler(*blobs(), 32), lambda m, x, y: -cross_entropy(m, x, y), 300
    )


@case("optimizer", must=("loss_diverging", "loss_nonfinite"), source="deepchecker")
def flipped_sign_regression() -> Setup:
    model = mlp((8, 32, 1))
    return Setup(model, sgd(model, 0.01, maximize=True), sampler(*teacher(), 32), squared_error, 250)


@case("optimizer", must=("overclipped",))
def overclipped_sgd() -> Setup:
    model = mlp((10, 32, 4))
    return Setup(model, sgd(model, 0.05), sampler(*blobs(), 64), cross_entropy, 300, clip=1e-4)


@case("optimizer", must=("overclipped",))
def overclipped_rnn() -> Setup:
    model = Recurrent("RNN", 4, 24, 4)
    return Setup(model, sgd(model, 0.1), last_symbol(64, 12), cross_entropy, 250, clip=3e-5, probes_time=True)


@case("optimizer", must=("clip_starvation", "overclipped"))
def clip_starvation_adam() -> Setup:
    model = mlp((10, 32, 4))
    return Setup(model, adam(model, 1e-3), sampler(*blobs(), 64), cross_entropy, 300, clip=1e-9)


@case("optimizer", must=("clip_starvation", "overclipped"))
def clip_starvation_adamw_cnn() -> Setup:
    model = cnn()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)
    return Setup(model, optimizer, sampler(*images(), 32), cross_entropy, 150, clip=1e-6)


@case("optimizer", must=("weights_growing", "loss_nonfinite", "loss_diverging"))
def penalty_of_wrong_sign() -> Setup:
    model = mlp((10, 32, 4), nn.Tanh)

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(m, x, y) - 0.1 * sum(p.square().sum() for p in m.parameters())

    return Setup(model, sgd(model, 0.2), sampler(*blobs(), 32), loss, 300)


# Vanishing, dead, saturated


@case("architecture", must=("vanishing_gradient",), source="autotrainer")
def vanishing_deep_sigmoid() -> Setup:
    model = mlp((2, *[16] * 8, 2), nn.Sigmoid)
    return Setup(model, sgd(model, 0.01), sampler(*circles(), 32), cross_entropy, 250)


@case("architecture", must=("vanishing_gradient",), source="autotrainer")
def vanishing_deep_sigmoid_blobs() -> Setup:
    model = mlp((10, *[24] * 10, 4), nn.Sigmoid)
    return Setup(model, adam(model, 1e-3), sampler(*blobs(), 32), cross_entropy, 200)


@case("architecture", must=("vanishing_gradient",))
def vanishing_deep_tanh() -> Setup:
    model = mlp((10, *[24] * 12, 4), nn.Tanh, gain=0.3)
    return Setup(model, sgd(model, 0.05), sampler(*blobs(), 32), cross_entropy, 200)


@case("architecture", must=("vanishing_gradient",), source="deepchecker")
def vanishing_small_init() -> Setup:
    model = mlp((10, *[32] * 5, 4), gain=0.02)
    return Setup(model, sgd(model, 0.05), sampler(*blobs(), 32), cross_entropy, 200)


@case("architecture", must=("vanishing_gradient",))
def vanishing_rnn() -> Setup:
    """The first symbol of fifty is asked for."""
    model = Recurrent("RNN", 4, 24, 4)
    draw = last_symbol(32, 50)

    def first(step: int) -> Batch:
        x, _ = draw(step)
        return x, x[:, 0].argmax(1)

    nn.init.orthogonal_(model.rnn.weight_hh_l0, gain=0.6)
    return Setup(model, sgd(model, 0.1), first, cross_entropy, 150, probes_time=True)


@case("architecture", must=("dead_relu", "zero_gradient"))
def dead_bias() -> Setup:
    model = mlp((10, 32, 32, 4))
    with torch.no_grad():
        model[2].bias.fill_(-50.0)
    return Setup(model, sgd(model, 0.05), sampler(*blobs(), 32), cross_entropy)


@case("architecture", must=("dead_relu", "zero_gradient"))
def dead_cnn() -> Setup:
    model = cnn()
    with torch.no_grad():
        model[0].bias.fill_(-30.0)
    return Setup(model, adam(model, 1e-3), sampler(*images(), 32), cross_entropy, 150)


@case("optimizer", "architecture", must=("dead_relu", "zero_gradient", *LR_SIGNS))
def dead_by_one_step() -> Setup:
    """One huge first step kills a layer, or with some seeds all of the run; afterwards the rate is small."""
    model = mlp((10, 32, 32, 4))
    optimizer = sgd(model, 0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 4000.0 if step == 0 else 1.0)
    return Setup(model, optimizer, sampler(*blobs(), 32), cross_entropy, 200, scheduler=schedule)


@case("architecture", must=("saturated_activation",))
def saturated_tanh_init() -> Setup:
    model = mlp((10, 32, 32, 32, 4), nn.Tanh, gain=60.0)
    with torch.no_grad():
        model[-1].weight /= 60
    return Setup(model, sgd(model, 1e-4), sampler(*blobs(spread=3.0), 32), cross_entropy, 200)


@case("architecture", must=("saturated_activation", "vanishing_gradient"))
def saturated_sigmoid_init() -> Setup:
    model = mlp((10, 32, 32, 32, 4), nn.Sigmoid, gain=80.0)
    with torch.no_grad():
        model[-1].weight.zero_()
        for layer in (model[2], model[4]):
            layer.bias.fill_(-400.0)
    return Setup(model, sgd(model, 0.01), sampler(*blobs(spread=3.0), 32), cross_entropy, 200)


@case("architecture", must=("zero_gradient",), source="deepchecker")
def zero_init() -> Setup:
    model = mlp((10, 32, 32, 4), gain=0.0)
    return Setup(model, sgd(model, 0.1), sampler(*blobs(), 32), cross_entropy)


@case("architecture", must=("zero_gradient", "dead_relu"), source="deepchecker")
def zero_init_deep_cnn() -> Setup:
    model = cnn()
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    nn.init.zeros_(model[5].weight)
    return Setup(model, adam(model, 1e-3), sampler(*images(), 32), cross_entropy, 150)


@case(
    "architecture",
    must=("exploding_gradient", "saturated_activation", *LR_SIGNS),
    source="deepchecker",
)
def wrong_init_unit_normal() -> Setup:
    model = mlp((10, *[64] * 5, 4))
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight)
    return Setup(model, sgd(model, 0.01), sampler(*blobs(), 32), cross_entropy)


@case(
    "architecture",
    must=("exploding_gradient", "saturated_activation", *LR_SIGNS),
    source="deepchecker",
)
def wrong_init_uniform_regression() -> Setup:
    model = mlp((8, *[64] * 5, 1))
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.uniform_(layer.weight, 0.0, 1.0)
    return Setup(model, sgd(model, 1e-3), sampler(*teacher(), 32), squared_error)


@case(
    "architecture",
    "optimizer",
    must=("exploding_gradient", "loss_nonfinite", "loss_diverging"),
    source="autotrainer",
)
def exponential_activations() -> Setup:
    model = mlp((2, 16, 16, 16, 16, 2), Exponential)
    return Setup(model, sgd(model, 0.1), sampler(*circles(), 32), cross_entropy)


@case(
    "architecture",
    "optimizer",
    must=("exploding_gradient", "loss_nonfinite", "loss_diverging", "no_traction"),
    source="autotrainer",
)
def exponential_activations_blobs() -> Setup:
    model = mlp((10, 16, 16, 16, 16, 4), Exponential)
    return Setup(model, adam(model, 0.01), sampler(*blobs(), 32), cross_entropy)


@case("architecture", None, must=("no_traction", "vanishing_gradient"), source="deepchecker")
def redundant_softmax() -> Setup:
    """A softmax before the loss that has one, on a scale where it cannot learn."""
    model = nn.Sequential(*mlp((2, 16, 16, 10)), nn.Softmax(1))
    x, _ = moons()
    y = (5 * (x[:, 0] + 1.2)).long().clamp(0, 9)
    return Setup(model, sgd(model, 0.02), sampler(x, y, 64), cross_entropy, 300)


# Data


@case("data", must=("data_nonfinite",))
def nan_in_a_batch() -> Setup:
    model = mlp((10, 32, 4))
    draw = sampler(*blobs(), 32)

    def batch(step: int) -> Batch:
        x, y = draw(step)
        if step == 80:
            x[3, 4] = math.nan
        return x, y

    return Setup(model, adam(model, 3e-3), batch, cross_entropy, 150)


@case("data", must=("data_nonfinite",))
def inf_in_the_targets() -> Setup:
    model = mlp((8, 32, 1))
    draw = sampler(*teacher(), 32)

    def batch(step: int) -> Batch:
        x, y = draw(step)
        if step >= 60 and step % 20 == 0:
            y[0] = math.inf
        return x, y

    return Setup(model, sgd(model, 0.05), batch, squared_error, 150)


@case("data", must=("data_scale",), source="autotrainer")
def circles_times_100() -> Setup:
    x, y = circles()
    model = mlp((2, 16, 16, 16, 2), nn.Tanh)
    return Setup(model, sgd(model, 0.05), sampler(100 * x, y, 32), cross_entropy, 250)


@case("data", must=("data_scale",), source="autotrainer")
def blobs_times_100() -> Setup:
    x, y = blobs()
    model = mlp((10, 24, 24, 4), nn.Sigmoid)
    return Setup(model, sgd(model, 0.05), sampler(100 * x, y, 32), cross_entropy, 200)


@case("data", must=("data_scale",), source="deepchecker")
def missing_normalisation() -> Setup:
    x, y = images()
    model = cnn()
    return Setup(model, sgd(model, 0.05, 0.9), sampler(128 + 60 * x, y, 32), cross_entropy, 150)


@case("data", must=("data_scale",), source="deepchecker")
def missing_normalisation_regression() -> Setup:
    x, y = teacher()
    model = mlp((8, 32, 1))
    return Setup(model, sgd(model, 0.02), sampler(x * 500 + 1000, y, 32), squared_error, 150)


@case("data", must=("data_scale",))
def batch_of_large_inputs() -> Setup:
    model = mlp((10, 32, 4))
    draw = sampler(*blobs(spread=2.0), 32)

    def batch(step: int) -> Batch:
        x, y = draw(step)
        return (1000 * x, y.flip(0)) if step in (100, 101) else (x, y)

    return Setup(model, sgd(model, 0.05), batch, cross_entropy, 200)


@case("data", must=("data_scale",))
def batch_of_large_targets() -> Setup:
    model = mlp((8, 32, 1), nn.Tanh)
    draw = sampler(*teacher(), 32)

    def batch(step: int) -> Batch:
        x, y = draw(step)
        return (x, 3000 * y) if step == 120 else (x, y)

    return Setup(model, sgd(model, 0.02), batch, squared_error, 200)


# Dtype


@case("dtype", must=("fp16_underflow",))
def fp16_underflow() -> Setup:
    model = mlp((10, 64, 64, 4)).half()
    x, y = blobs()
    return Setup(
        model,
        sgd(model, 100.0),
        sampler(x.half(), y, 32),
        lambda m, x, y: 2e-7 * F.cross_entropy(m(x).float(), y),
    )


@case("dtype", must=("fp16_underflow",))
def fp16_underflow_deep() -> Setup:
    model = mlp((8, *[32] * 4, 1), nn.Tanh).half()
    x, y = teacher()

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return 1e-6 * F.mse_loss(m(x).float(), y.float())

    return Setup(model, sgd(model, 10.0), sampler(x.half(), y.half(), 64), loss)


@case("dtype", must=("fp16_overflow",))
def fp16_overflow() -> Setup:
    """Activations that float32 holds with ease."""
    model = mlp((10, 64, 64, 4), gain=1.4)
    with torch.no_grad():
        model[0].weight *= 120
        model[2].weight *= 60
        model[4].weight /= 7000
    x, y = blobs()
    model = model.half()
    return Setup(
        model, sgd(model, 1e-5), sampler(x.half(), y, 32), lambda m, x, y: F.cross_entropy(m(x).float(), y)
    )


@case("dtype", must=("fp16_overflow",))
def fp16_overflow_in_backward() -> Setup:
    """A loss scaled by hand, beyond what float16 gradients hold."""
    model = mlp((10, 32, 4)).half()
    x, y = blobs()
    return Setup(
        model,
        sgd(model, 1e-7),
        sampler(x.half(), y, 32),
        lambda m, x, y: 2e6 * F.cross_entropy(m(x).float(), y),
    )


# Repaired twins: each of the article's five fixes


@case(twin="vanishing_deep_sigmoid", source="article")
def repaired_by_fewer_layers() -> Setup:
    model = mlp((2, 16, 2), nn.Sigmoid)
    return Setup(model, adam(model, 0.02), sampler(*circles(), 32), cross_entropy, 250)


@case(twin="vanishing_deep_sigmoid_blobs", source="article")
def repaired_by_relu() -> Setup:
    model = mlp((10, *[24] * 10, 4), gain=math.sqrt(2))
    return Setup(model, adam(model, 1e-3), sampler(*blobs(), 32), cross_entropy, 200)


@case(twin="exploding_rnn_tokens", source="article")
def repaired_by_lstm() -> Setup:
    model = Recurrent("LSTM", 12, 24, 12, tokens=True)

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(m(x), y[:, -1])

    return Setup(model, adam(model, 0.01), markov(16, 24), loss, 150, probes_time=True)


@case(twin="exploding_unscaled_targets", source="article")
def repaired_by_clipping() -> Setup:
    x, y = regression(scale=2.0)
    model = mlp((20, 25, 1))
    nn.init.kaiming_uniform_(model[0].weight, nonlinearity="relu")
    return Setup(model, sgd(model, 0.01, 0.9), sampler(x, y, 32), squared_error, 400, clip=1.0)


@case(twin="penalty_of_wrong_sign", source="article")
def repaired_by_penalty() -> Setup:
    model = mlp((10, 32, 4), nn.Tanh)

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(m, x, y) + 1e-3 * sum(p.square().sum() for p in m.parameters())

    return Setup(model, sgd(model, 0.2), sampler(*blobs(), 32), loss, 300)


@case(twin="exploding_large_targets", source="article")
def repaired_by_scaled_targets() -> Setup:
    model = mlp((8, 48, 48, 1))
    return Setup(model, sgd(model, 0.01, 0.9), sampler(*teacher(), 16), squared_error, 200)


# Mistakes that users make


@case("data", must=("data_scale",))
def raw_pixels() -> Setup:
    x, y = images()
    model = mlp((64, 64, 64, 4))
    x = (128 + 40 * x.flatten(1)).clamp(0, 255)
    return Setup(model, sgd(model, 0.1), sampler(x, y, 32), cross_entropy)


@case("data", must=("data_scale",))
def one_feature_in_another_unit() -> Setup:
    x, y = blobs()
    x[:, 3] *= 1e6
    model = mlp((10, 32, 4), nn.Tanh)
    return Setup(model, adam(model, 1e-3), sampler(x, y, 32), cross_entropy)


@case("data", must=("data_scale",))
def prices_as_targets() -> Setup:
    """Adam moves the outputs by a few units; the targets are hundreds of thousands away."""
    x, y = teacher()
    model = mlp((8, 32, 1))
    return Setup(model, adam(model, 1e-3), sampler(x, 3e5 + 1e5 * y, 32), squared_error, 300)


@case("data", must=("data_scale",))
def inputs_in_the_wrong_unit() -> Setup:
    x, y = blobs()
    model = mlp((10, 32, 32, 4))
    return Setup(model, sgd(model, 0.1), sampler(1e-4 * x, y, 32), cross_entropy, 300)


@case("dtype", must=("fp16_overflow", "weights_nonfinite"))
def fp16_summed_loss() -> Setup:
    """The gradients are sound, their sum of squares is not."""
    x, y = teacher()
    model = mlp((8, 64, 1)).half()

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (m(x) - y).square().sum()

    return Setup(model, sgd(model, 1e-7), sampler(x.half(), (40 * y).half(), 256), loss)


@case("dtype", must=("weights_nonfinite", "fp16_overflow", "fp16_underflow"))
def fp16_eps_is_zero() -> Setup:
    """Adam's eps of 1e-8 is 0 in float16."""
    model = mlp((10, 64, 4)).half()
    x, y = blobs()
    return Setup(
        model, adam(model, 1e-3), sampler(x.half(), y, 32), lambda m, x, y: F.cross_entropy(m(x).float(), y)
    )


@case("dtype", must=("update_rounded_away",))
def bfloat16_updates_are_rounded_away() -> Setup:
    model = mlp((10, 64, 4)).bfloat16()
    x, y = blobs()
    return Setup(
        model,
        sgd(model, 2e-5),
        sampler(x.bfloat16(), y, 128),
        lambda m, x, y: F.cross_entropy(m(x).float(), y),
        300,
    )


@case("optimizer", must=("weights_shrinking", "update_ratio_high"))
def weight_decay_too_strong() -> Setup:
    model = mlp((10, 32, 32, 4))
    return Setup(model, sgd(model, 0.05, weight_decay=10.0), sampler(*blobs(), 32), cross_entropy, 300)


@case("optimizer", must=("weights_shrinking",))
def decoupled_weight_decay_too_strong() -> Setup:
    model = mlp((10, 32, 32, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=100.0)
    return Setup(model, optimizer, sampler(*blobs(), 64), cross_entropy, 300)


@case("optimizer", must=("update_ratio_low",))
def schedule_of_epochs_called_for_batches() -> Setup:
    model = mlp((10, 32, 4))
    optimizer = adam(model, 1e-3)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    return Setup(model, optimizer, sampler(*blobs(spread=2.0), 32), cross_entropy, 300, scheduler=schedule)


@case("optimizer", must=LR_SIGNS)
def lr_high_transformer_without_warmup() -> Setup:
    model = Transformer(blocks=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return Setup(model, optimizer, markov(16, 16), cross_entropy, 150)


@case("architecture", must=("grad_nonfinite",))
def root_of_zero() -> Setup:
    """The loss holds the root of a distance that is exactly 0: its gradient is 0 times Inf."""
    model = mlp((8, 32, 1))

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out = m(x)
        return F.mse_loss(out, y) + (out - out.detach()).abs().sqrt().mean()

    return Setup(model, sgd(model, 0.01), sampler(*teacher(), 32), loss, 100)


@case("architecture", must=("dead_relu", "zero_gradient"))
def relu_on_the_output() -> Setup:
    x, y = teacher()
    model = nn.Sequential(*mlp((8, 32, 1)), nn.ReLU())
    return Setup(model, sgd(model, 0.05), sampler(x, -y.abs() - 1, 32), squared_error)


@case("architecture", must=("vanishing_gradient",))
def thirty_plain_layers() -> Setup:
    model = mlp((10, *[32] * 30, 4))
    return Setup(model, adam(model, 1e-3), sampler(*blobs(), 32), cross_entropy)


@case("architecture", must=("symmetric_units",), source="deepchecker")
def constant_init() -> Setup:
    model = mlp((10, 32, 32, 4), nn.Tanh, gain=0.0)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.constant_(layer.weight, 0.1)
    return Setup(model, sgd(model, 0.001), sampler(*blobs(), 32), cross_entropy, 300)
