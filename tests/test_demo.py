"""The demo: two runs that differ in clipping alone, and a table and a picture that say what happened."""

from __future__ import annotations

import hashlib
import importlib.util
import math
from pathlib import Path

import pytest
import torch

import gradkern
from gradkern import demo
from gradkern.demo import Run, Text
from tests.backends import Backend

pytest.importorskip("rich", reason="the demo's extra is not installed")
pytest.importorskip("matplotlib", reason="the demo's extra is not installed")

SENTENCE = "Gradients that grow are clipped, and gradients that do not are left alone. "


@pytest.fixture
def text() -> Text:
    return demo.encode(SENTENCE * 40)


def trained(text: Text, max_norm: float | None, steps: int) -> Run:
    torch.set_num_threads(1)
    run = Run("run", max_norm)
    for _ in demo.train(text, run, steps=steps, seed=demo.SEED, learning_rate=demo.LEARNING_RATE):
        pass
    return run


def test_the_text_is_split_into_nine_parts_to_train_on_and_one_to_test_on(text: Text) -> None:
    assert (len(text.train), len(text.held_out)) == (2700, 300)
    assert torch.cat([text.train, text.held_out]).tolist()[:75] * 40 == [
        sorted(set(SENTENCE)).index(symbol) for symbol in SENTENCE * 40
    ]


def test_the_hash_is_that_of_the_whole_text(text: Text) -> None:
    assert text.sha256 == hashlib.sha256((SENTENCE * 40).encode()).hexdigest()


def test_a_uniform_guess_takes_the_logarithm_of_the_number_of_symbols(text: Text) -> None:
    assert 2**text.uniform_bits == pytest.approx(len(set(SENTENCE)))


def test_the_manual_of_this_python_is_long_enough_to_train_on() -> None:
    manual = demo.load_text()
    assert manual.characters > 300_000
    assert 90 < manual.symbols < 200


def test_an_untrained_network_needs_about_as_many_bits_as_a_uniform_guess(text: Text) -> None:
    torch.manual_seed(0)
    found = demo.held_out_bits(demo.CharacterRNN(text.symbols), text)
    assert found == pytest.approx(text.uniform_bits, rel=0.1)


def test_recurrent_weights_start_orthogonal() -> None:
    weight = demo.CharacterRNN(10).rnn.get_parameter("weight_hh_l0").detach().double()
    torch.testing.assert_close(
        weight @ weight.T, torch.eye(demo.HIDDEN, dtype=torch.float64), rtol=0, atol=1e-5
    )


def test_both_runs_start_from_the_same_weights_and_batch(text: Text) -> None:
    unclipped, clipped = trained(text, None, 1), trained(text, 0.25, 1)
    assert unclipped.norms == clipped.norms
    assert unclipped.bits == clipped.bits


def test_the_same_seed_gives_the_same_run(text: Text) -> None:
    assert trained(text, 0.25, 5).norms == trained(text, 0.25, 5).norms


def test_the_recorded_norm_is_the_one_before_clipping(text: Text) -> None:
    assert trained(text, 1e-3, 1).norms[0] == trained(text, None, 1).norms[0] > 1e-3


def test_every_step_above_the_limit_counts_as_clipped(text: Text) -> None:
    run = trained(text, 1.0, 10)
    assert run.clipped_steps == sum(norm > 1.0 for norm in run.norms)
    assert 0 < run.clipped_steps < 10


def test_on_the_manual_the_network_learns_only_if_it_is_clipped() -> None:
    manual = demo.load_text()
    assert trained(manual, 0.25, 40).held_out_bits < 0.6 * manual.uniform_bits
    assert trained(manual, None, 40).held_out_bits > manual.uniform_bits


def test_on_the_manual_the_gradients_explode_unless_they_are_clipped() -> None:
    manual = demo.load_text()
    assert trained(manual, None, 40).first_exploded is not None
    assert trained(manual, 0.25, 40).first_exploded is None


def test_a_step_explodes_from_a_hundred_times_the_median_of_the_first_ten() -> None:
    run = Run("run", None, norms=[1.0] * 4 + [3.0] * 6 + [299.0, 301.0, 500.0])
    assert run.early_norm == 3.0
    assert run.first_exploded == 12


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_non_finite_step_has_exploded_and_is_the_largest(norm: float) -> None:
    run = Run("run", None, norms=[1.0] * 10 + [norm, 2.0])
    assert run.first_exploded == 11
    assert run.largest_norm == pytest.approx(norm, nan_ok=True)


def test_the_first_non_finite_parameter_is_the_first_in_the_models_order() -> None:
    grads = {"a": torch.ones(2), "b": torch.tensor([1.0, math.inf]), "c": torch.tensor([math.nan])}
    assert demo.first_nonfinite_parameter(gradkern.measure_grads(grads)) == "b"


def test_the_step_and_the_parameter_that_turned_non_finite_are_recorded(
    text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter([1.0, 1.0, math.nan, math.nan])

    def loss(model: torch.nn.Module, windows: torch.Tensor) -> torch.Tensor:
        return (
            next(steps) * model.get_parameter("head.bias").sum() + model.get_parameter("embed.weight").sum()
        )

    monkeypatch.setattr(demo, "next_character_loss", loss)
    monkeypatch.setattr(demo, "held_out_bits", lambda model, text: math.nan)
    assert trained(text, 0.25, 4).first_nonfinite == (3, "head.bias")


def cells(text: Text, runs: list[Run]) -> dict[str, list[str]]:
    """The table as `title: [cell of each run]`."""
    columns = [list(column.cells) for column in demo.table(text, runs).columns]
    return {str(row[0]).strip(): [str(cell) for cell in row[1:]] for row in zip(*columns, strict=True)}


def test_the_table_says_never_where_nothing_happened(text: Text) -> None:
    found = cells(text, [Run("clipped", 0.25, norms=[1.0] * 20, clipped_steps=5, held_out_bits=2.0)])
    assert found["first step over 100× the early median"] == ["never"]
    assert found["first non-finite step"] == ["never"]
    assert found["steps clipped"] == ["5 of 20 (25%)"]


def test_the_table_says_where_it_went_wrong(text: Text) -> None:
    run = Run("unclipped", None, norms=[1.0] * 10 + [4e5, math.nan], first_nonfinite=(12, "rnn.weight_hh_l0"))
    found = cells(text, [run])
    assert found["first step over 100× the early median"] == ["11"]
    assert found["first non-finite step"] == ["12, in rnn.weight_hh_l0"]
    assert found["largest gradient norm"] == ["nan"]
    assert found["bits per character, held-out text"] == ["nan"]


def test_the_verdict_does_not_claim_what_did_not_happen(text: Text) -> None:
    calm = Run("unclipped", None, norms=[1.0] * 20, held_out_bits=2.0)
    lost = Run("clipped", 0.5, norms=[1.0] * 20, held_out_bits=math.nan)
    assert demo.verdict(text, calm, lost).splitlines() == [
        "Without clipping the gradients did not explode with this seed and the network learned something "
        "even so.",
        "With max_norm=0.5 it did not learn either: nan bits per character; knowing nothing takes "
        f"{text.uniform_bits:.2f}.",
    ]


def test_the_picture_shows_both_norms_the_limit_and_the_non_finite_steps() -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    unclipped = Run("unclipped", None, norms=[1.0, 1e5, math.inf, math.nan])
    demo.draw_norms(axes, unclipped, Run("clipped", 0.25, norms=[1.0, 2.0, 1.0, 1.0]))
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    assert list(lines) == ["unclipped", "unclipped: NaN or Inf", "clipped", "max_norm = 0.25"]
    assert list(lines["unclipped: NaN or Inf"].get_xdata()) == [3, 4]
    assert list(lines["unclipped"].get_ydata())[:2] == [1.0, 1e5]
    assert axes.get_yscale() == "log"


def test_the_command_prints_the_hash_and_writes_the_picture(
    text: Text,
    backend: Backend,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "load_text", lambda: text)
    picture = tmp_path / "norms.png"
    demo.main(["--steps", "10", "--out", str(picture)])
    printed = capsys.readouterr().out
    assert text.sha256[:16] in printed
    assert gradkern.backend() in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "9"], "--steps must be at least 10, got 9"),
        (["--max-norm", "0"], "--max-norm must be positive, got 0"),
        (["--max-norm", "nan"], "--max-norm must be positive, got nan"),
        (["--lr", "inf"], "--lr must be positive and finite, got inf"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--out", "norms.txt"], "--out must end in .png, .pdf or .svg, got norms.txt"),
        (["--out", "/nowhere/norms.png"], "--out: there is no directory /nowhere"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_trained(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        demo.main(arguments)
    assert capsys.readouterr().err.endswith(f"error: {message}\n")


@pytest.mark.parametrize("name", ["rich", "matplotlib"])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == name else found(asked))
    with pytest.raises(SystemExit) as stop:
        demo.main([])
    assert str(stop.value) == (
        f"gradkern.demo needs {name}, which is not installed.\n"
        "Install the demo's extra: pip install 'gradkern[demo]' (or: pip install rich matplotlib)"
    )
