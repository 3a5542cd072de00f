from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gradkern import ops, selftest
from gradkern.selftest import checks, speed
from gradkern.selftest.promises import PROMISES

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason=selftest.NO_GPU)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that take no time."""
    monkeypatch.setattr(checks, "SIZES", (0, 1, 9, 1025))


@no_gpu
@pytest.mark.usefixtures("short")
def test_without_a_gpu_it_checks_the_cpu_and_says_what_it_skips(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "selftest.json"
    assert selftest.main(["--json", str(path)]) == 0
    printed = capsys.readouterr().out
    for name in PROMISES:
        assert f"skipped cuda  {name:26} torch sees no GPU here" in printed
    record = json.loads(path.read_text())
    outcomes = {(check["device"], check["outcome"]) for check in record["checks"]}
    kernels = {("cpu", "ok"), ("cuda", "skipped")}
    assert outcomes == kernels if ops.native is not None else kernels | {("cpu", "skipped")}
    assert record["speed"] == []
    assert record["environment"]["torch"] == torch.__version__


@pytest.mark.parametrize("column", range(5))
def test_a_wrong_statistic_is_found_out(column: int, short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = ops.measure

    def wrong(grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        rows, total = measure(grads)
        rows[:, column] *= 1.00001
        rows[:, column] += 1
        return rows, total

    monkeypatch.setattr(ops, "measure", wrong)
    result = selftest.run_check("statistics", "cpu", lambda: checks.CHECKS["statistics"]("cpu"))
    assert result.outcome == "FAILED"
    assert "float32" in result.detail


def test_a_wrong_element_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clip_ = ops.clip_

    def wrong(grads: list[Tensor], *args: object) -> object:
        found = clip_(grads, *args)
        grads[-1].view(-1)[-2] *= 1.01
        return found

    monkeypatch.setattr(ops, "clip_", wrong)
    result = selftest.run_check("clipping", "cpu", lambda: checks.CHECKS["clipping"]("cpu"))
    assert result.outcome == "FAILED"
    assert "a written element is wrong" in result.detail


def test_the_speed_table_has_a_row_for_each_contender_and_situation() -> None:
    workload = speed.Workload("few", [100, 28], torch.float32)
    rows = speed.measure_rows("cpu", workload, copy_gb_s=10.0)
    assert {(row.situation.split(",")[0], row.contender) for row in rows} == {
        (situation, contender)
        for situation in ("nothing to clip", "clipped")
        for contender in ("gradkern", "torch foreach")
    }
    for row in rows:
        assert row.ms > 0
        assert row.of_copy == pytest.approx(row.floor_gb_s / 10.0)
        reads_and_writes = 3 if row.situation.startswith("clipped") else 1
        assert row.floor_gb_s == pytest.approx(reads_and_writes * 128 * 4 / row.ms / 1e6)
    lines = selftest.table(10.0, rows).splitlines()
    assert len(lines) == 4 + len(rows)
    assert all(line.count("|") == 8 for line in lines[2:])


def test_the_lists_have_the_sizes_they_are_named_after() -> None:
    numel = {workload.name: sum(workload.sizes) for workload in speed.WORKLOADS}
    assert math.isclose(numel["GPT-2 small, 124 M"], 124e6, rel_tol=0.01)
    assert math.isclose(numel["7B-parameter list"], 6.74e9, rel_tol=0.01)
    assert numel["one tensor of 1.5 B"] == 1_500_000_000


@on_a_gpu
@pytest.mark.parametrize("name", checks.CHECKS)
def test_every_kernel_is_right_on_the_gpu(name: str) -> None:
    result = selftest.run_check(name, "cuda", lambda: checks.CHECKS[name]("cuda"))
    assert result.outcome != "FAILED", result.detail


@on_a_gpu
@pytest.mark.parametrize("name", PROMISES)
def test_every_promise_is_kept_on_the_gpu(name: str) -> None:
    result = selftest.run_check(name, "cuda", PROMISES[name])
    assert result.outcome != "FAILED", result.detail
