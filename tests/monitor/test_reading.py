"""What a step's numbers mean: who skipped it, where NaN came from, and whose a gradient is."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gradkern
from gradkern.monitor import Monitor

X = torch.linspace(-1, 1, 32).reshape(8, 4)


def made() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def events(monitor: Monitor, kind: str) -> list[int]:
    return [event["step"] for event in monitor.record.events if event["kind"] == kind]


def amp(
    monitor_of: Callable[[nn.Module, torch.optim.Optimizer], Monitor],
    *,
    fused: bool,
    bad: tuple[int, ...],
    hands: bool = False,
    clips: bool = False,
    clears: bool = False,
) -> Monitor:
    """Twelve steps under a GradScaler from 1024. At those of `bad` gradients overflow."""
    model = made()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    if clips:
        gradkern.Clipper(model, 1.0).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    monitor = monitor_of(model, optimizer)
    for step in range(12):
        optimizer.zero_grad()
        loss = model(X).square().mean()
        scaler.scale(loss).backward()
        if step in bad:
            for param in model.parameters():
                assert param.grad is not None
                param.grad.fill_(math.inf)
        monitor.loss = loss
        scaler.step(optimizer)
        scaler.update()
        if clears:
            optimizer.zero_grad()
        if not monitor._attached:
            monitor.step(loss, scaler=scaler if hands else None)
    monitor.close()
    return monitor


@pytest.mark.parametrize("bad", [(0, 1, 2, 3), (5,)])
@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("hands", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_what_a_scaler_skips_is_no_alarm(
    fused: bool, hands: bool, clips: bool, bad: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="gradkern"):
        monitor = amp(Monitor, fused=fused, bad=bad, hands=hands, clips=clips)
    assert events(monitor, "amp_backoff") == list(bad)
    assert events(monitor, "first_nonfinite") == []
    steps, skipped = monitor.record.scalar("skipped")
    assert steps[skipped > 0].tolist() == list(bad)
    assert [finding.kind for finding in monitor.findings if finding.is_alarm] == []
    assert not caplog.records


@pytest.mark.parametrize("bad", [(0, 1, 2, 3), (5,)])
def test_attached_what_a_scaler_makes_a_fused_optimizer_skip_is_no_alarm(bad: tuple[int, ...]) -> None:
    monitor = amp(lambda model, optimizer: Monitor(model).attach(optimizer), fused=True, bad=bad)
    assert events(monitor, "amp_backoff") == list(bad)
    assert [finding.kind for finding in monitor.findings if finding.is_alarm] == []


def test_attached_steps_that_a_scaler_leaves_out_are_not_seen() -> None:
    monitor = amp(lambda model, optimizer: Monitor(model).attach(optimizer), fused=False, bad=(0, 5))
    assert monitor.record.steps.tolist() == list(range(10))
    assert not np.isinf(monitor.record.scalar("grad_norm")[1]).any()


@pytest.mark.parametrize("fused", [False, True])
def test_the_scale_is_that_of_the_step_though_nobody_hands_the_scaler_over(fused: bool) -> None:
    monitor = amp(Monitor, fused=fused, bad=(5,))
    assert monitor.record.scalar("loss_scale")[1].tolist() == [1024] * 6 + [512] * 6


def test_output_gradients_of_a_step_whose_scale_nobody_knows_are_left_out() -> None:
    monitor = amp(Monitor, fused=False, bad=(0, 1, 2))
    assert len(monitor.record.rows("out_grad_norm")[0]) == 0
    assert len(monitor.record.rows("act_abs_max")[0]) == 1


def test_a_skipped_step_whose_gradients_are_cleared_already_has_no_norm() -> None:
    monitor = amp(Monitor, fused=False, bad=(5,), clears=True)
    assert 5 not in monitor.record.scalar("grad_norm")[0]
    assert events(monitor, "amp_backoff") == [5]


def test_a_loss_that_is_lost_is_an_error_under_a_scaler_too() -> None:
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with Monitor(model, optimizer) as monitor:
        for step in range(8):
            optimizer.zero_grad()
            loss = model(X).square().mean() * (math.nan if step >= 4 else 1)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            monitor.step(loss)
    found = {finding.kind: finding.severity for finding in monitor.findings}
    assert found["loss_nonfinite"] == "error"


def test_a_step_that_the_loop_leaves_out_by_itself_is_a_warning() -> None:
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Monitor(model, optimizer) as monitor:
        for step in range(8):
            optimizer.zero_grad()
            loss = model(X).square().mean()
            loss.backward()
            if step == 4:
                assert model[0].weight.grad is not None
                model[0].weight.grad[0, 0] = math.nan
            else:
                optimizer.step()
            monitor.step(loss)
    assert events(monitor, "skip") == [4]
    assert [(f.kind, f.severity) for f in monitor.findings if f.is_alarm] == [("grad_nonfinite", "warning")]


def test_the_steps_of_an_accumulation_are_not_skipped_ones() -> None:
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Monitor(model, optimizer) as monitor:
        for step in range(8):
            loss = model(X).square().mean()
            loss.backward()
            if step % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
            monitor.step(loss)
    assert not monitor.record.scalar("skipped")[1].any()


def clipped_by_hand(model: nn.Module, _: Any) -> Any:
    return gradkern.clip_(model.named_parameters(), 1.0)


def diverge(
    clip: Callable[[nn.Module, Any], Any] | None, attach: bool | None = None, **arguments: Any
) -> dict[str, Any]:
    """Step 13 makes the weights infinite. Where it says NaN came from."""
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    clipper = None if attach is None else gradkern.Clipper(model, 1.0)
    if clipper is not None and attach:
        clipper.attach(optimizer)
    with Monitor(model, optimizer, clipper=clipper, **arguments) as monitor:
        for step in range(25):
            optimizer.param_groups[0]["lr"] = math.inf if step == 13 else 1e-2
            optimizer.zero_grad()
            loss = model(X).square().mean()
            loss.backward()
            stats = None if clip is None else clip(model, clipper)
            optimizer.step()
            monitor.step(loss, stats)
    return next(e["detail"] for e in monitor.record.events if e["kind"] == "first_nonfinite")


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(
    ("clip", "attach"),
    [
        (None, None),
        (clipped_by_hand, None),
        (lambda model, _: nn.utils.clip_grad_norm_(model.parameters(), 1.0), None),
        (lambda _, clipper: clipper(), False),
        (None, True),
    ],
)
def test_weights_that_a_step_ruined_are_named_whoever_measures(clip: Any, attach: Any, every: int) -> None:
    found = diverge(clip, attach, every=every)
    assert found == {"where": "optimizer", "name": "0.weight", "step": 14}


def test_where_nobody_has_looked_at_the_weights_the_origin_is_unknown() -> None:
    with Monitor(made(), activations_every=0) as monitor:
        for step in range(8):
            monitor.step(math.nan if step == 5 else 1.0)
    origin = next(e["detail"] for e in monitor.record.events if e["kind"] == "first_nonfinite")
    assert origin == {"where": "unknown", "name": "", "step": 5}


@pytest.mark.parametrize("clipper_first", [True, False])
@pytest.mark.parametrize("fused", [False, True])
def test_an_attached_clipper_is_found_in_either_order(clipper_first: bool, fused: bool) -> None:
    model = made()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    if clipper_first:
        gradkern.Clipper(model, 0.01).attach(optimizer)
    monitor = Monitor(model, optimizer)
    if not clipper_first:
        gradkern.Clipper(model, 0.01).attach(optimizer)
    norms = []
    for step in range(5):
        optimizer.zero_grad()
        loss = model(X).square().mean() * (math.nan if step == 3 else 1)
        loss.backward()
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters())))  # type: ignore[union-attr]
        optimizer.step()
        monitor.step(loss)
    monitor.close()
    record = monitor.record
    np.testing.assert_allclose(record.scalar("grad_norm")[1], norms, rtol=1e-6)
    assert record.scalar("clip_threshold")[1].tolist() == [0.01] * 5
    assert record.scalar("skipped")[1].tolist() == [0, 0, 0, 1, 0]
    assert record.meta["clip"]["threshold"] == 0.01


def rows_of(
    make_stats: Callable[[nn.Sequential], Any], frozen: int | None = None
) -> tuple[Monitor, dict[str, float]]:
    """One step with the statistics that `make_stats` gives; and the norms of the gradients before it."""
    model = made()
    if frozen is not None:
        model[frozen].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Monitor(model, optimizer) as monitor:
        loss = (model(X) - 5).square().mean()
        loss.backward()
        truth = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
        stats = make_stats(model)
        optimizer.step()
        monitor.step(loss, stats)
    return monitor, truth


def recorded(monitor: Monitor) -> dict[str, float]:
    _, rows = monitor.record.rows("grad_norm")
    return {
        n: v for n, v in zip(monitor.record.names("grad_norm"), rows[0], strict=True) if not math.isnan(v)
    }


@pytest.mark.parametrize(
    "listed",
    [
        lambda model: list(model.parameters()),
        lambda model: [param for param in model.parameters() if param.requires_grad],
        lambda model: sorted(model.parameters(), key=lambda param: param.dim()),
        lambda model: (param for param in model.parameters()),
    ],
)
@pytest.mark.parametrize("frozen", [None, 0])
def test_parameters_without_names_are_known_by_identity(listed: Any, frozen: int | None) -> None:
    monitor, truth = rows_of(lambda model: gradkern.clip_(listed(model), 1.0), frozen)
    assert recorded(monitor) == pytest.approx(truth, rel=1e-6)


def test_of_gradients_without_names_only_the_totals_are_recorded() -> None:
    def clip(model: nn.Module) -> Any:
        return gradkern.clip_grads_([param.grad for param in model.parameters()], 1.0)

    monitor, truth = rows_of(clip)
    assert len(monitor.record.rows("grad_norm")[0]) == 0
    assert monitor.record.scalar("grad_norm")[1][0] == pytest.approx(math.hypot(*truth.values()), rel=1e-6)


@pytest.mark.parametrize("as_number", [False, True])
def test_with_the_norm_that_torch_gives_rows_are_those_before_clipping(as_number: bool) -> None:
    def clip(model: nn.Module) -> Any:
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        return norm.item() if as_number else norm

    monitor, truth = rows_of(clip)
    assert recorded(monitor) == pytest.approx(truth, rel=1e-4)
    assert monitor.record.scalar("grad_clipped_norm")[1][0] == pytest.approx(1e-3, rel=1e-3)


def test_of_what_the_optimizer_does_not_hold_no_update_is_recorded() -> None:
    model = made()
    first = torch.optim.Adam(model[0].parameters(), lr=1e-3)
    second = torch.optim.SGD(model[2].parameters(), lr=1e-2)
    with Monitor(model, first, weights_every=1) as monitor:
        for _ in range(3):
            model.zero_grad()
            loss = model(X).square().mean()
            loss.backward()
            before = [param.detach().clone() for param in model[0].parameters()]
            first.step()
            second.step()
            monitor.step(loss)
    moved = [(param - old).norm().item() for param, old in zip(model[0].parameters(), before, strict=True)]
    _, rows = monitor.record.rows("update_norm")
    assert np.isnan(rows).tolist() == [[False, False, True, True]] * 3
    np.testing.assert_allclose(rows[-1, :2], moved, rtol=1e-5)
    assert monitor.record.scalar("update_norm")[1][-1] == pytest.approx(math.hypot(*moved), rel=1e-5)


def test_freezing_and_thawing_is_followed() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, weights_every=2) as monitor:
        for step in range(6):
            model.bias.requires_grad_(step < 3)
            monitor.step(1.0)
            entries = monitor._ledger.meta["parameters"]
            assert [entry["requires_grad"] for entry in entries] == [True, step < 4]


def test_an_optimizer_without_a_learning_rate_is_watched() -> None:
    class Relative(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": None, "eps": (1e-30, 1e-3)})

        def step(self, closure: Any = None) -> None:
            return None

    model = nn.Linear(2, 1)
    with Monitor(model, Relative(model.parameters())) as monitor:
        monitor.step(1.0)
    assert monitor.record.steps.tolist() == [0]
    assert len(monitor.record.scalar("lr")[0]) == 0
