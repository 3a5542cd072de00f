"""Runs with one fault each, by someone who had not seen the detectors. Held out at first, tuned on since.

Each case is a run that learns, into which one fault is put: with ``fault=False`` its builder makes the same
run without it. The first label is the category of the fault. All were trained both ways, in plain torch, on
seeds 1 to 4: the run without the fault learns and the one with it does not. The usual remedies were tried
on the faulty runs too, on two of the seeds: a rate divided or multiplied by 10 and by 100, clipping,
standardised data, another initialisation, float32 and, for Adam in half precision, a larger epsilon. Where
one of them repairs a run as well as undoing the fault does, its category is the second label.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.diagnosis.runs import Batch, Setup
from tests.diagnosis.suite import (
    Recurrent,
    Residual,
    Transformer,
    adam,
    blobs,
    case,
    cnn,
    cross_entropy,
    images,
    last_symbol,
    markov,
    mlp,
    sampler,
    sgd,
    squared_error,
    teacher,
)

NONFINITE = ("loss_nonfinite", "grad_nonfinite", "weights_nonfinite")
STANDSTILL = ("update_ratio_low", "no_traction")
WILD = ("loss_diverging", "loss_unstable", "exploding_gradient", "update_ratio_high", "no_traction")

# Data


@case("data", must=("data_scale", "no_traction", "exploding_gradient"))
def prices_in_dollars(fault: bool = True) -> Setup:
    """House prices as they are: the output has to get to three hundred thousand by steps of a thousandth."""
    x, y = teacher()
    model = mlp((8, 64, 64, 1))
    y = 3e5 + 1e5 * y if fault else y
    return Setup(model, adam(model), sampler(x, y, 32), squared_error, 300)


@case("data", must=("data_scale", "loss_diverging", "weights_growing", "exploding_gradient"))
def pixels_as_probabilities(fault: bool = True) -> Setup:
    """An autoencoder whose pixels, 0 to 255, are the targets of a binary cross-entropy."""
    x, _ = images(400)
    pixels = (128 + 60 * x).clamp(0, 255).round().flatten(1) / (1 if fault else 255)
    model = mlp((64, 48, 12, 48, 64))

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(m(x), y)

    return Setup(model, adam(model, 3e-3), sampler(pixels, pixels, 32), loss, 250)


@case("data", must=("data_scale", "exploding_gradient", "loss_unstable"))
def timestamp_among_features(fault: bool = True) -> Setup:
    """One column holds the time, in seconds since 1970."""
    x, y = blobs(spread=1.5)
    model = mlp((10, 32, 32, 4))
    if fault:
        x[:, 3] = 1.7e9 + 2.6e6 * torch.rand(len(x))
    return Setup(model, torch.optim.AdamW(model.parameters(), lr=2e-3), sampler(x, y, 32), cross_entropy, 250)


@case("data", must=("data_nonfinite", *NONFINITE))
def standardised_by_batch(fault: bool = True) -> Setup:
    """Features are divided by their deviation in the batch; that of a rare flag is often zero."""
    x, y = blobs(spread=1.5)
    x[:, 5] = (torch.rand(len(x)) < 0.03).float()
    draw = sampler(x, y, 32)

    def batch(step: int) -> Batch:
        x, y = draw(step)
        return (x - x.mean(0)) / (x.std(0) + (0.0 if fault else 1e-3)), y

    model = mlp((10, 48, 4), nn.Tanh)
    return Setup(model, sgd(model, 0.05, 0.9), batch, cross_entropy, 150)


@case("data", must=("data_scale", "loss_unstable", "gradient_spike", "no_traction"))
def missing_readings_coded(fault: bool = True) -> Setup:
    """Two percent of a sensor's readings are missing, which is written as -9999."""

    def batch(step: int) -> Batch:
        time = 6 * torch.rand(16, 1) + 0.3 * torch.arange(25)
        wave = time.sin() + 0.5 * (2.3 * time).cos() + 0.05 * torch.randn(16, 25)
        wave[torch.rand(16, 25) < 0.02] = -9999.0 if fault else 0.0
        return wave[:, :-1, None], wave[:, 1:, None]

    model = Recurrent("GRU", 1, 24, 1, every=True)
    return Setup(model, adam(model, 5e-3), batch, squared_error, 200, probes_time=True)


@case("data", must=("data_nonfinite", *NONFINITE))
def log_of_zero_counts(fault: bool = True) -> Setup:
    """Word counts enter as their logarithm, and most words do not occur."""
    rates = 4 * torch.rand(4, 24) ** 2
    y = torch.randint(0, 4, (400,))
    counts = torch.poisson(rates[y])
    x = counts.log() if fault else counts.log1p()
    model = mlp((24, 32, 4))
    return Setup(model, sgd(model, 0.1), sampler(x, y, 32), cross_entropy)


@case(
    "data",
    must=("data_scale", "no_traction", "vanishing_gradient", "zero_gradient", "saturated_activation"),
)
def prices_into_lstm(fault: bool = True) -> Setup:
    """Share prices around 4000 go into gates that saturate at 4; the next move is asked for."""

    def batch(step: int) -> Batch:
        time = 6 * torch.rand(32, 1) + 0.4 * torch.arange(21)
        wave = time.sin() + 0.1 * torch.randn(32, 21)
        prices = 4000 + 150 * wave
        x = prices if fault else (prices - 4000) / 150
        return x[:, :-1, None], (wave[:, -1] > wave[:, -2]).long()

    model = Recurrent("LSTM", 1, 24, 2)
    return Setup(model, adam(model, 0.01), batch, cross_entropy, 200, probes_time=True)


@case(
    "data",
    must=("data_scale", "loss_unstable", "loss_spike", "gradient_spike", "exploding_gradient", "no_traction"),
)
def targets_of_two_units(fault: bool = True) -> Setup:
    """A few of the lengths are in millimetres, the others in metres."""
    x, y = teacher()
    if fault:
        y[::25] *= 1000
    model = mlp((8, 32, 32, 1))
    return Setup(model, adam(model, 3e-3), sampler(x, y, 32), squared_error, 300)


# Dtype


@case("dtype", "optimizer", must=("fp16_underflow", *NONFINITE))
def half_adam_eps(fault: bool = True) -> Setup:
    """Adam's epsilon of 1e-8 is zero in float16, and so are squares of small gradients."""
    model = cnn()
    x, y = images()
    if fault:
        model, x = model.half(), x.half()
    return Setup(
        model, adam(model, 1e-3), sampler(x, y, 32), lambda m, x, y: F.cross_entropy(m(x).float(), y), 120
    )


class RootMeanSquareNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


@case("dtype", "architecture", must=("fp16_overflow", "zero_gradient", "no_traction"))
def half_norm_squares(fault: bool = True) -> Setup:
    """A normalisation by hand squares a residual stream that has one large channel."""
    stem = nn.Embedding(12, 32)
    with torch.no_grad():
        stem.weight *= 8
        stem.weight[:, 3] += 400
    model = nn.Sequential(stem, RootMeanSquareNorm(32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 12))
    if fault:
        model = model.half()

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(m(x).float().flatten(0, 1), y.flatten())

    return Setup(model, sgd(model, 0.05, 0.9), markov(32, 16), loss, 250)


class PaddedAttention(nn.Module):
    """One layer of attention by hand, over sequences that are padded on the left with token 0."""

    def __init__(self, symbols: int, width: int, length: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(symbols, width), nn.Embedding(length, width)
        self.qkv, self.head = nn.Linear(width, 3 * width), nn.Linear(width, symbols)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.place(torch.arange(x.shape[1]))
        q, k, v = self.qkv(h).chunk(3, -1)
        later = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        hidden = (later | (x == 0)[:, None]).to(h.dtype)
        scores = q @ k.mT / math.sqrt(h.shape[-1]) + hidden * -1e9
        out: Tensor = self.head(h + scores.softmax(-1) @ v)
        return out


@case("dtype", must=("fp16_overflow", *NONFINITE))
def half_mask_of_padding(fault: bool = True) -> Setup:
    """Padding is masked with -1e9, which is -inf in float16: nothing is left for queries before the text."""
    model = PaddedAttention(13, 32, 16)
    if fault:
        model = model.half()
    draw = markov(16, 16)

    def batch(step: int) -> Batch:
        x, y = draw(step)
        padding = torch.arange(16) < torch.randint(0, 8, (16, 1))
        return (x + 1).masked_fill(padding, 0), (y + 1).masked_fill(padding, 0)

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(m(x).float().flatten(0, 1), y.flatten(), ignore_index=0)

    return Setup(model, sgd(model, 0.3, 0.9), batch, loss, 200)


@case("dtype", "optimizer", must=(*STANDSTILL, "fp16_underflow"))
def bfloat16_updates_lost(fault: bool = True) -> Setup:
    """Weights of eight bits, which steps of a fraction of a thousandth do not change."""
    model = mlp((8, 32, 32, 1), nn.Tanh, gain=1.5)
    x, y = teacher()
    if fault:
        model, x, y = model.bfloat16(), x.bfloat16(), y.bfloat16()
    return Setup(
        model, adam(model, 2e-4), sampler(x, y, 32), lambda m, x, y: F.mse_loss(m(x).float(), y.float()), 400
    )


@case("dtype", must=("amp_backoff", "fp16_overflow", "loss_nonfinite", "grad_nonfinite"))
def half_contrast_by_hand(fault: bool = True) -> Setup:
    """Exponentials of similarities over 0.05 overflow float16 whatever the loss scale."""
    model = mlp((10, 48, 48, 16))
    x, _ = blobs()

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16, enabled=fault):
            views = torch.cat([x + 0.3 * torch.randn_like(x), x + 0.3 * torch.randn_like(x)])
            z = F.normalize(m(views), dim=1)
            ratio = (z @ z.T / 0.05).exp() * (1 - torch.eye(len(z)))
            return -(ratio.diagonal(len(x)) / ratio.sum(1)[: len(x)]).log().mean()

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    return Setup(model, adam(model, 3e-3), sampler(x, x, 32), loss, 200, scaler=scaler)


@case("dtype", must=("fp16_underflow", *NONFINITE))
def half_log_guard(fault: bool = True) -> Setup:
    """A cross-entropy by hand, whose guard of 1e-8 is too small once a float16 probability is 1."""
    x, y = blobs(classes=2)
    model = nn.Sequential(*mlp((10, 32, 1)), nn.Sigmoid())
    if fault:
        model, x = model.half(), x.half()

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        p: Tensor = m(x).squeeze(1)
        return -(y * (p + 1e-8).log() + (1 - y) * (1 - p + 1e-8).log()).mean()

    return Setup(model, sgd(model, 0.5), sampler(x, y, 32), loss, 400)


# Optimizer


@case("optimizer", must=("no_traction", "vanishing_gradient", "update_ratio_high", "weights_shrinking"))
def decay_of_adamw_in_adam(fault: bool = True) -> Setup:
    """AdamW's weight decay, given to Adam, is a penalty that outweighs the loss."""
    model = mlp((10, 32, 32, 4))
    kind = torch.optim.Adam if fault else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=3e-3, weight_decay=0.5)
    return Setup(model, optimizer, sampler(*blobs(spread=1.5), 32), cross_entropy, 250)


@case("optimizer", must=("weights_growing", "saturated_activation", *WILD))
def momentum_of_one(fault: bool = True) -> Setup:
    """A momentum of 0.999 where 0.9 was meant."""
    model = mlp((8, 32, 1), nn.Tanh)
    optimizer = sgd(model, 0.05, 0.999 if fault else 0.9)
    return Setup(model, optimizer, sampler(*teacher(), 32), squared_error, 300)


@case("optimizer", must=("weights_growing", "zero_gradient", *WILD))
def summed_over_tokens(fault: bool = True) -> Setup:
    """The loss is summed over sequences and tokens; the rate is for the mean."""
    model = Recurrent("GRU", 12, 24, 12, tokens=True, every=True)

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(m(x).flatten(0, 1), y.flatten(), reduction="sum" if fault else "mean")

    return Setup(model, sgd(model, 0.5, 0.9), markov(16, 16), loss, 200, probes_time=True)


@case("optimizer", must=STANDSTILL)
def epoch_schedule_by_batch(fault: bool = True) -> Setup:
    """A rate that halves each epoch is halved each batch."""
    model = cnn()
    optimizer = sgd(model, 0.05, 0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1 if fault else 40, 0.5)
    return Setup(model, optimizer, sampler(*images(), 32), cross_entropy, 200, scheduler=schedule)


@case("optimizer", must=("update_spike", "loss_spike", "gradient_spike", *WILD, *NONFINITE))
def one_cycle_too_high(fault: bool = True) -> Setup:
    """The peak of a one-cycle schedule is a hundred times too high."""
    x, _ = images(400)
    x = x.flatten(1)
    model = mlp((64, 48, 16, 48, 64))
    optimizer = sgd(model, 0.1, 0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 30.0 if fault else 0.3, total_steps=260)
    return Setup(model, optimizer, sampler(x, x, 32), squared_error, 250, scheduler=schedule)


@case("optimizer", must=STANDSTILL)
def warmup_without_end(fault: bool = True) -> Setup:
    """A warmup of two million steps."""
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (2e6 if fault else 30))
    )
    return Setup(model, optimizer, markov(16, 16), cross_entropy, 150, clip=1.0, scheduler=schedule)


@case("optimizer", must=STANDSTILL)
def adam_eps_of_one(fault: bool = True) -> Setup:
    """Adam's epsilon dwarfs the gradients that it should be compared with."""
    x, y = teacher()
    model = mlp((8, 64, 64, 64, 1))
    return Setup(
        model, adam(model, 1e-3, eps=1.0 if fault else 1e-8), sampler(x, 0.1 * y, 64), squared_error, 250
    )


@case("optimizer", must=("weights_growing", "loss_spike", "gradient_spike", *WILD))
def betas_swapped(fault: bool = True) -> Setup:
    """Adam with the decay rates of its two averages exchanged."""
    model = mlp((10, 48, 48, 4))
    optimizer = adam(model, 0.01, betas=(0.999, 0.9) if fault else (0.9, 0.999))
    return Setup(model, optimizer, sampler(*blobs(spread=1.5), 32), cross_entropy, 300)


@case("optimizer", must=("saturated_activation", "vanishing_gradient", "zero_gradient", *WILD))
def rmsprop_rate_of_sgd(fault: bool = True) -> Setup:
    """RMSprop with the rate that SGD had."""
    model = Recurrent("LSTM", 12, 24, 12, tokens=True, every=True)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.5 if fault else 5e-3)
    return Setup(model, optimizer, markov(16, 16), cross_entropy, 200, probes_time=True)


@case("optimizer", must=("dead_relu", "zero_gradient", *WILD))
def head_rate_of_ten(fault: bool = True) -> Setup:
    """The head was to have ten times the rate of the body, and has a rate of ten."""
    body, head = mlp((10, 48, 48)), nn.Linear(48, 4)
    model = nn.Sequential(body, nn.ReLU(), head)
    groups = [
        {"params": body.parameters(), "lr": 0.01},
        {"params": head.parameters(), "lr": 10.0 if fault else 0.1},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    return Setup(model, optimizer, sampler(*blobs(spread=2.5), 32), cross_entropy)


@case("optimizer", must=STANDSTILL)
def plateau_upside_down(fault: bool = True) -> Setup:
    """The rate is cut whenever the loss has not grown for ten steps."""
    model = mlp((8, 32, 32, 1))
    optimizer = adam(model, 3e-3)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, "max" if fault else "min", 0.2, patience=10
    )
    seen: list[float] = []

    class AfterStep:
        def step(self) -> None:
            schedule.step(seen[-1])

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        value = squared_error(m, x, y)
        seen.append(float(value.detach()))
        return value

    return Setup(model, optimizer, sampler(*teacher(), 64), loss, 250, scheduler=AfterStep())


# Architecture


class Block(nn.Module):
    """A residual block, or what is left of it without its skip."""

    def __init__(self, width: int, skip: bool) -> None:
        super().__init__()
        self.linear, self.act, self.skip = nn.Linear(width, width), nn.ReLU(), skip

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.linear(x))
        return x + out if self.skip else out


@case("architecture", must=("vanishing_gradient", "dead_relu", "no_traction"))
def thirty_layers_without_skips(fault: bool = True) -> Setup:
    model = nn.Sequential(
        nn.Linear(10, 32), *(Block(32, not fault) for _ in range(30)), nn.LayerNorm(32), nn.Linear(32, 4)
    )
    return Setup(model, adam(model, 1e-3), sampler(*blobs(), 32), cross_entropy, 150)


@case("architecture", must=("exploding_gradient", "saturated_activation", "no_traction"))
def chaotic_recurrence(fault: bool = True) -> Setup:
    """Recurrent weights of gain 2.5 over sixty steps."""
    model = Recurrent("RNN", 4, 32, 4)
    nn.init.orthogonal_(model.rnn.weight_hh_l0, gain=2.5 if fault else 0.9)
    return Setup(model, adam(model, 3e-3), last_symbol(32, 60), cross_entropy, 150, probes_time=True)


@case("architecture", must=("vanishing_gradient", "no_traction"))
def lstm_that_forgets(fault: bool = True) -> Setup:
    """Forget gates start shut, and the first of twenty symbols is asked for."""
    model = Recurrent("LSTM", 4, 24, 4)
    with torch.no_grad():
        model.rnn.bias_ih_l0[24:48] = -6.0 if fault else 3.0
    draw = last_symbol(32, 20)

    def first(step: int) -> Batch:
        x, _ = draw(step)
        return x, x[:, 0].argmax(1)

    return Setup(model, adam(model, 0.01), first, cross_entropy, 200, probes_time=True)


@case("architecture", must=("vanishing_gradient", "no_traction"))
def softmax_between_layers(fault: bool = True) -> Setup:
    activation = (lambda: nn.Softmax(1)) if fault else nn.ReLU
    model = mlp((10, 48, 48, 48, 4), activation)
    return Setup(model, sgd(model, 0.05, 0.9), sampler(*blobs(), 32), cross_entropy, 200)


@case("architecture", must=("dead_relu", "zero_gradient", "no_traction"))
def relu_on_negative_targets(fault: bool = True) -> Setup:
    """Energies, which are all below zero, from an output that cannot be."""
    x, y = teacher()
    model = mlp((8, 32, 32, 1))
    if fault:
        model.append(nn.ReLU())
    return Setup(model, adam(model, 5e-3), sampler(x, 0.7 * y - 3, 32), squared_error, 250)


@case("architecture", must=("exploding_gradient",))
def residuals_without_norm(fault: bool = True) -> Setup:
    """Two dozen residual blocks of Kaiming weights, each of which more than doubles what enters."""
    model = nn.Sequential(
        nn.Linear(8, 32),
        *(Residual(32, norm=not fault) for _ in range(24)),
        nn.LayerNorm(32) if not fault else nn.Identity(),
        nn.Linear(32, 1),
    )
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return Setup(model, adam(model, 1e-3), sampler(*teacher(), 32), squared_error, 150)


class GroupedNorm(nn.Module):
    def __init__(self, groups: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.view(len(x), self.groups, -1)
        centred = grouped - grouped.mean(2, keepdim=True)
        return (centred / (centred.square().mean(2, keepdim=True) + self.eps).sqrt()).flatten(1)


@case("architecture", must=NONFINITE)
def norm_without_eps(fault: bool = True) -> Setup:
    """A normalisation by hand divides by zero where no unit of a group is active."""
    norm = GroupedNorm(10, 0.0 if fault else 1e-5)
    model = nn.Sequential(nn.Linear(10, 40), nn.ReLU(), norm, nn.Linear(40, 4))
    return Setup(model, adam(model, 3e-3), sampler(*blobs(spread=1.5), 32), cross_entropy, 200)


@case("architecture", must=("vanishing_gradient", "no_traction"))
def batchnorm_left_in_eval(fault: bool = True) -> Setup:
    """Batch normalisation does nothing as the model is in evaluation mode."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise([1, *[8] * 12]):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4))
    model.train(not fault)
    return Setup(model, sgd(model, 0.05, 0.9), sampler(*images(), 16), cross_entropy, 120)


@case("architecture", must=("exploding_gradient", "loss_diverging", *NONFINITE))
def leaky_slope_of_two(fault: bool = True) -> Setup:
    """A slope of 2 for negative inputs, where 0.2 was meant."""
    model = mlp((8, *[32] * 12, 1), lambda: nn.LeakyReLU(2.0 if fault else 0.2), gain=1.3)
    return Setup(model, sgd(model, 0.005, 0.9), sampler(*teacher(), 32), squared_error, 200)


class Graph(nn.Module):
    """Layers that mix each node with its neighbours: with their mean, or with their sum."""

    def __init__(self, links: Tensor, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("links", links)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for place, layer in enumerate(self.layers):
            x = self.links @ layer(x)
            x = self.act(x) if place < len(self.layers) - 1 else x
        return x


@case("architecture", must=("exploding_gradient",))
def graph_sums_neighbours(fault: bool = True) -> Setup:
    """Four graph layers add up two dozen neighbours each, where they should take the mean."""
    near = torch.rand(150, 2)
    links = (torch.cdist(near, near) < 0.25).float()
    x = torch.cat([4 * near - 2, torch.randn(150, 4)], 1)
    y = (3 * x[:, :1]).sin() * x[:, 1:2] + 0.1 * torch.randn(150, 1)
    model = Graph(links if fault else links / links.sum(1, keepdim=True), (6, 32, 32, 32, 1))
    return Setup(model, adam(model, 5e-3), lambda step: (x, y), squared_error, 250)
