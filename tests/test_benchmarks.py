"""The benchmark: every row's own check at tiny sizes, and what is made of times. Nothing is timed here."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import shapes, table
from benchmarks.cases import CASES, Case, Setting
from benchmarks.gradients import Gradients, WrongResult
from benchmarks.machine import Buffer, describe
from benchmarks.measure import KINDS, Contender, Effort, Timing, in_turn
from benchmarks.results import Form, Goal, Results, Row
from benchmarks.rivals import has_optax
from benchmarks.training import TRAINING_CASES

ROWS = [*CASES, *TRAINING_CASES]
ONCE = Effort(seconds=0, rounds=1)


def nothing() -> None:
    return None


@pytest.fixture(scope="module")
def buffer() -> Buffer:
    return Buffer(1 << 16)


@pytest.fixture
def row() -> Row:
    """gradkern takes 1 or 2 ms, torch 4 ms by one way and 9 by the other, a plain read 0.75."""
    timings = [
        Timing("gradkern", "clip_", [1.0, 2.0, 1.0], 1e-16),
        Timing("torch", "torch foreach", [4.0, 4.0, 4.0], 1e-6),
        Timing("torch", "torch loop", [9.0, 1.0, 9.0], 2e-6),
        Timing("ceiling", "plain read", [0.75, 0.75, 0.75]),
    ]
    goals = (Goal("torch", floor=3.0, aim=5.0), Goal("ceiling", "share", 0.8, 0.9))
    return Row("key", "some rows", "some work", 3, 1000, "memory", goals, timings)


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.key)
def test_every_contender_of_every_row_passes_its_own_check(case: Case, buffer: Buffer) -> None:
    gradients = case.gradients(tiny=True)
    timings = in_turn(case.contenders(gradients, Setting(buffer)), ONCE, nothing)
    assert {timing.kind for timing in timings} >= {
        "gradkern",
        *(goal.against for goal in case.goals if goal.against not in ("ceiling", "norm only")),
    }
    for goal in case.goals:
        assert not goal.of or goal.of in {timing.name for timing in timings if timing.kind == "gradkern"}
    assert all(len(timing.times_ms) == 1 for timing in timings)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["perceptron", "clipped-bf16"])
def test_torch_compile_passes_the_check(key: str) -> None:
    case = next(case for case in CASES if case.key == key)
    gradients = case.gradients(tiny=True)
    timings = in_turn(case.contenders(gradients, Setting(rivals=frozenset({"compiled"}))), ONCE, nothing)
    assert "compiled" in {timing.kind for timing in timings}


@pytest.mark.skipif(not has_optax(), reason="optax is not installed")
@pytest.mark.parametrize("key", ["perceptron", "clipped-bf16"])
def test_optax_passes_the_check(key: str) -> None:
    case = next(case for case in CASES if case.key == key)
    gradients = case.gradients(tiny=True)
    timings = in_turn(case.contenders(gradients, Setting(rivals=frozenset({"optax"}))), ONCE, nothing)
    assert "optax" in {timing.kind for timing in timings}


def test_keys_are_unique_and_goals_name_contenders() -> None:
    assert len({case.key for case in ROWS}) == len(ROWS)
    assert {goal.against for case in ROWS for goal in case.goals} <= set(KINDS)


@pytest.mark.parametrize(
    ("build", "tensors", "numel"),
    [
        (shapes.gpt2_small, 148, 124_439_808),
        (shapes.resnet, 162, 1_965_600),
        (shapes.perceptron, 20, 657_920),
        (shapes.many_small, 2000, 128_000),
    ],
)
def test_shapes_are_those_of_the_models(build: Callable[[], shapes.Shapes], tensors: int, numel: int) -> None:
    found = build()
    assert (len(found), sum(math.prod(shape) for shape in found.values())) == (tensors, numel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_the_norm_asked_for(dtype: torch.dtype) -> None:
    gradients = Gradients({"a": (50, 40), "b": (7,)}, dtype, norm=3.0)
    assert gradients.norm == pytest.approx(3.0, rel=0.1)
    everything = torch.cat([grad.double().flatten() for grad in gradients.grads])
    assert gradients.norm == pytest.approx(everything.norm().item(), rel=1e-14)


def test_parameters_hang_in_a_module_by_their_names() -> None:
    gradients = Gradients({"a.b.weight": (2,), "a.bias": (3,), "scale": (1,)}, torch.float32, norm=1.0)
    names = [name for name, _ in gradients.module.named_parameters()]
    assert sorted(names) == ["a.b.weight", "a.bias", "scale"]


@pytest.mark.parametrize("everything", [True, False])
def test_a_wrong_gradient_fails_the_check(everything: bool) -> None:
    gradients = Gradients({"a": (4,)}, torch.float32, norm=1.0)
    gradients.grads[0].mul_(1.001)
    with pytest.raises(WrongResult, match="elements are not within"):
        gradients.check(gradients.norm, 1.0, 0.0, 1e-4, everything=everything)


def test_a_gradient_turned_nan_fails_the_check() -> None:
    gradients = Gradients({"a": (4,)}, torch.float32, norm=1.0)
    gradients.grads[0][1] = math.nan
    with pytest.raises(WrongResult, match="1 elements"):
        gradients.check(gradients.norm, 1.0, 0.0, 1e-4, everything=True)


@pytest.mark.parametrize("wrong", [1.0001, math.nan, math.inf])
def test_a_wrong_norm_fails_the_check(wrong: float) -> None:
    gradients = Gradients({"a": (4,)}, torch.float32, norm=1.0)
    with pytest.raises(WrongResult, match="the norm is"):
        gradients.check(gradients.norm * wrong, 1.0, 1e-6, 0.0, everything=True)


def test_restore_undoes_clipping() -> None:
    gradients = Gradients({"a": (4,), "b": (5,)}, torch.float32, norm=1.0)
    for grad in gradients.grads:
        grad.mul_(0.5)
    gradients.restore()
    gradients.check(gradients.norm, 1.0, 0.0, 0.0, everything=True)


def test_each_round_calls_everyone_once_and_checks_what_it_returned() -> None:
    log: list[str] = []

    def contender(name: str) -> Contender:
        def call() -> str:
            log.append(name)
            return name

        def check(result: str, everything: bool) -> None:
            assert result == log[-1] == name
            log.append("all" if everything else "some")

        return Contender("gradkern", name, call, check, lambda: log.append("before"))

    in_turn([contender(name) for name in "abc"], Effort(0, rounds=4), lambda: log.append("evict"))
    first = log[:9]
    assert first == ["before", "a", "all", "before", "b", "all", "before", "c", "all"]
    rounds = [log[9 + 12 * index : 21 + 12 * index] for index in range(4)]
    assert [sorted(step[2::4]) for step in rounds] == [["a", "b", "c"]] * 4
    assert all(step[0::4] == ["before"] * 3 and step[1::4] == ["evict"] * 3 for step in rounds)
    assert all(step[3::4] == ["some"] * 3 for step in rounds)
    assert len({tuple(step[2::4]) for step in rounds}) > 1


def test_a_row_goes_on_until_its_time_is_up_but_not_below_the_least_rounds() -> None:
    effort = Effort(seconds=0.0, least=5, most=9)
    assert [effort.goes_on(rounds, started=0.0) for rounds in (4, 5)] == [True, False]
    endless = Effort(seconds=math.inf, least=5, most=9)
    assert [endless.goes_on(rounds, started=0.0) for rounds in (8, 9)] == [True, False]


def test_the_headline_is_the_ratio_of_medians_to_the_faster_of_torchs_ways(row: Row) -> None:
    assert row.ratio(row.goals[0]) == 4.0
    assert row.ratio_quartiles(row.goals[0]) == (3.0, 4.0)


def test_a_share_of_the_ceiling_is_its_time_over_ours(row: Row) -> None:
    assert row.ratio(row.goals[1]) == 0.75


def test_a_time_is_ours_over_the_rivals(row: Row) -> None:
    goal = Goal("ceiling", "time", floor=1.4)
    assert row.ratio(goal) == pytest.approx(1 / 0.75)
    assert row.verdict(goal) == "floor"


@pytest.mark.parametrize(
    ("form", "value", "words"), [("extra", -3000.0, "-3000 µs"), ("each", 1e6 / 3, "333333 ns")]
)
def test_extra_time_is_in_microseconds_and_time_for_each_tensor_in_nanoseconds(
    row: Row, form: Form, value: float, words: str
) -> None:
    goal = Goal("torch", form, floor=value)
    assert row.ratio(goal) == pytest.approx(value)
    assert goal.words(row.ratio(goal)) == words
    assert (row.verdict(goal), row.verdict(Goal("torch", form, floor=value - 1))) == ("floor", "missed")


def test_a_goal_may_be_about_one_of_gradkerns_contenders(row: Row) -> None:
    row.timings.append(Timing("gradkern", "slower", [8.0, 8.0, 8.0]))
    assert row.ratio(Goal("torch", of="slower")) == 0.5
    assert row.ratio(Goal("torch")) == row.ratio(Goal("torch", of="clip_")) == 4.0
    assert row.title(Goal("torch", of="slower")) == "some work: slower"


def test_rounds_with_different_work_count_by_the_mean_of_their_medians() -> None:
    assert Timing("torch", "name", [9.0, 1.0, 2.0, 8.0, 1.0, 3.0], period=3).median_ms == 4.0


@pytest.mark.parametrize(
    ("goal", "verdict"),
    [
        (Goal("torch", floor=3.0, aim=4.0), "aim"),
        (Goal("torch", floor=4.0, aim=5.0), "floor"),
        (Goal("torch", floor=4.1, aim=5.0), "missed"),
        (Goal("torch"), ""),
        (Goal("optax", floor=3.0), ""),
        (Goal("torch", "time", floor=0.25), "floor"),
        (Goal("torch", "time", floor=0.24), "missed"),
    ],
)
def test_a_verdict_says_whether_the_aim_or_the_floor_is_reached(row: Row, goal: Goal, verdict: str) -> None:
    assert row.verdict(goal) == verdict


def test_the_table_has_a_line_per_row_with_as_many_cells_as_its_header(row: Row) -> None:
    results = Results("a machine", {}, {"copy": 50.0}, [row, row])
    blocks = [block.splitlines() for block in table.markdown(results).split("\n\n") if block.startswith("|")]
    assert [len(block) for block in blocks] == [4, 4]
    for block in blocks:
        assert len({line.count("|") for line in block}) == 1


def test_the_table_shows_medians_ratio_floor_aim_and_whether_they_are_met(row: Row) -> None:
    line = next(
        line for line in table.markdown(Results("m", {}, {}, [row])).splitlines() if "some work" in line
    )
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "some work",
        "memory",
        "1.00 ± 25%",
        "torch foreach",
        "4.00 ± 0%",
        "**4.00×** (3.00–4.00)",
        "3.00×",
        "5.00×",
        "floor",
        "75% (floor 80%, aim 90%: missed)",
    ]


def test_the_summary_counts_what_is_met_and_names_what_is_not(row: Row) -> None:
    assert table.summary([row]) == (
        "Floors met: 1 of 2. Aims met: 0 of 2.\nMissed: some work: 75% where 80% is demanded."
    )


@pytest.mark.parametrize(
    ("value", "text"), [(123.456, "123"), (12.345, "12.3"), (1.2345, "1.23"), (0.012345, "0.0123")]
)
def test_times_have_three_significant_digits(value: float, text: str) -> None:
    assert table.significant(value) == text


def test_a_saved_run_is_read_back_as_it_was(row: Row, tmp_path: Path) -> None:
    results = Results(str(describe()), describe().as_dict(), {"copy": 50.0}, [row])
    results.save(tmp_path / "run.json")
    assert Results.load(tmp_path / "run.json") == results


def test_the_command_writes_a_file_a_picture_and_a_table(
    row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs it")
    monkeypatch.setattr(command, "run", lambda options: Results("a machine", {}, {}, [row]))
    command.main(["--json", str(tmp_path / "b.json"), "--png", str(tmp_path / "b.png")])
    printed = capsys.readouterr().out
    assert "some work" in printed
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    command.main(["--load", str(tmp_path / "b.json"), "--png", str(tmp_path / "c.png")])
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nonsense"], "--only: there is no row 'nonsense'; there are unclipped-f32, "),
        (["--repeat", "0"], "--repeat must be at least 1, got 0"),
        (["--threads", "-1"], "--threads must be at least 1, got -1"),
        (["--load", "nowhere.json"], "--load: there is no file nowhere.json"),
    ],
)
def test_a_wrong_option_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert f"error: {message}" in capsys.readouterr().err
