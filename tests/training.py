"""Small training runs that the tests of clippers share."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

import gradkern
from gradkern import policies

Optimizer = torch.optim.Optimizer
MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]

FUSED: dict[str, MakeOptimizer] = {
    "adam": lambda params: torch.optim.Adam(params, lr=1e-2, fused=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9, fused=True),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-2, fused=True),
}
OTHERS: dict[str, MakeOptimizer] = {
    "momentum sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=1e-3, momentum=0.5),
    "nadam": lambda params: torch.optim.NAdam(params),
    "adafactor": lambda params: torch.optim.Adafactor(params),
    "plain adamw": lambda params: torch.optim.AdamW(params),
}

EVERY_POLICY: list[policies.Policy] = [
    policies.GlobalNorm(0.5),
    policies.GlobalNorm(0.05, norm_type=float("inf"), apply_to="rnn*"),
    policies.TensorNorm(0.2),
    policies.GroupNorm({"rnn*": 0.3, "*": 0.3}),
    policies.Value(0.05),
    policies.Value(0.05, apply_to=["rnn*", "head*"]),
    policies.BlockRMS(0.01),
    policies.AGC(0.05),
    policies.AGC(0.01, per="tensor"),
    policies.Percentile(10),
    policies.Percentile(10, per="tensor"),
    policies.ZClip(max_norm=0.5),
    policies.AdaGC(max_norm=0.5, warmup=20),
    policies.Chain(policies.SkipSpike(warmup=20), policies.GlobalNorm(0.5)),
    policies.Chain(policies.AGC(0.1), policies.GlobalNorm(0.5), policies.Value(0.1)),
]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def backward(model: nn.Module, step: int, scale: Tensor | float = 1.0) -> None:
    """Gradients of a loss that does not vanish, for every step has other targets."""
    data = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
    ((model(data[:, :5]) - data[:, 5:]).square().mean() * scale).backward()


def weights(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def largest_difference(one: Iterable[Tensor], other: Iterable[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


def train_rnn(policy: policies.Policy | None, steps: int = 200) -> float:
    """Train a small tanh RNN whose gradients explode; the mean loss of the last steps.

    It continues sequences of symbols that go round in steps of one or two.
    """
    torch.manual_seed(0)
    embed, rnn, head = nn.Embedding(8, 8), nn.RNN(8, 24, batch_first=True), nn.Linear(24, 8)
    with torch.no_grad():
        nn.init.orthogonal_(rnn.weight_hh_l0).mul_(1.6)
    model = nn.ModuleDict({"embed": embed, "rnn": rnn, "head": head})
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0, momentum=0.9)
    clipper = None if policy is None else gradkern.Clipper(model, policy).attach(optimizer)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        start = torch.randint(8, (8, 1), generator=generator)
        stride = torch.randint(1, 3, (8, 1), generator=generator)
        symbols = (start + stride * torch.arange(33)) % 8
        logits = head(rnn(embed(symbols[:, :-1]))[0])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), symbols[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        if clipper is not None:
            clipper.loss = loss
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20
