from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gradkern.record import Run, Writer

LOSSES = [0.1, float("nan"), float("inf"), -1e300]
ROWS = np.array([[0.1, np.nan], [np.inf, 3e38], [1e-45, -0.0], [1, 2]], np.float32)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with Writer(tmp_path / "run.gk") as writer:
        writer.set_names("grad_norm", ["a.weight", 'b,"c"'])
        for step in range(4):
            writer.put_scalars(step, {"loss": LOSSES[step]} | ({"lr": 0.5} if step % 2 else {}))
            writer.put_rows("grad_norm", step, ROWS[step])
    with Run.open(tmp_path / "run.gk") as opened:
        yield opened


def read(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_csv_has_a_column_for_each_scalar(run: Run, tmp_path: Path) -> None:
    run.to_csv(tmp_path / "out.csv")
    assert read(tmp_path / "out.csv")[0] == ["step", "loss", "lr"]


def test_scalars_in_csv_read_back_as_the_same_numbers(run: Run, tmp_path: Path) -> None:
    run.to_csv(tmp_path / "out.csv")
    got = [float(row[1]) for row in read(tmp_path / "out.csv")[1:]]
    np.testing.assert_array_equal(got, LOSSES)


def test_a_scalar_without_a_value_is_empty_in_csv(run: Run, tmp_path: Path) -> None:
    run.to_csv(tmp_path / "out.csv")
    assert [row[2] for row in read(tmp_path / "out.csv")[1:]] == ["", "0.5", "", "0.5"]


def test_names_survive_csv(run: Run, tmp_path: Path) -> None:
    run.to_csv(tmp_path / "out.csv", "grad_norm")
    assert read(tmp_path / "out.csv")[0] == ["step", "a.weight", 'b,"c"']


def test_rows_in_csv_read_back_as_the_same_numbers(run: Run, tmp_path: Path) -> None:
    run.to_csv(tmp_path / "out.csv", "grad_norm")
    got = np.array([row[1:] for row in read(tmp_path / "out.csv")[1:]]).astype(np.float32)
    assert got.tobytes() == ROWS.tobytes()


def test_scalars_in_parquet_are_the_same_numbers_or_null(run: Run, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    run.to_parquet(tmp_path / "out.parquet")
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table["step"].to_pylist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(table["loss"].to_pylist(), LOSSES)
    assert table["lr"].to_pylist() == [None, 0.5, None, 0.5]


def test_rows_in_parquet_are_float32_to_the_bit(run: Run, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    run.to_parquet(tmp_path / "out.parquet", "grad_norm")
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["step", "a.weight", 'b,"c"']
    got = np.stack([table[name].to_numpy() for name in table.column_names[1:]], axis=1)
    assert got.dtype == np.float32
    assert got.tobytes() == ROWS.tobytes()


def test_without_pyarrow_the_error_names_the_extra(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"to_parquet: .*`pip install gradkern\[parquet\]"):
        run.to_parquet(tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize("kind", ["act_dead", "scalars", "nonsense"])
def test_a_kind_that_was_not_recorded_is_refused_with_those_that_were(
    run: Run, tmp_path: Path, kind: str
) -> None:
    with pytest.raises(
        ValueError, match=rf"no rows of kind '{kind}' in .*\. Recorded are: grad_norm\. Scalars come without"
    ):
        run.to_csv(tmp_path / "out.csv", kind)
    assert not (tmp_path / "out.csv").exists()


def test_histograms_have_a_column_for_each_count(tmp_path: Path) -> None:
    histogram = np.arange(128).reshape(2, 64)
    with Writer(tmp_path / "run.gk") as writer:
        writer.set_names("exponents", ["a", "b"])
        writer.put_exponents(3, histogram)
    with Run.open(tmp_path / "run.gk") as run:
        run.to_csv(tmp_path / "out.csv", "exponents")
    header, row = read(tmp_path / "out.csv")
    assert (header[:5], header[64], header[65]) == (
        ["step", "a:zero", "a:subnormal", "a:nonfinite", "a:2^-44"],
        "a:2^16",
        "b:zero",
    )
    assert row == [str(number) for number in [3, *range(128)]]


def test_histograms_go_to_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    with Writer(tmp_path / "run.gk") as writer:
        writer.set_names("exponents", ["a"])
        writer.put_exponents(3, np.arange(64)[None])
    with Run.open(tmp_path / "run.gk") as run:
        run.to_parquet(tmp_path / "out.parquet", "exponents")
    assert parquet.read_table(tmp_path / "out.parquet")["a:2^16"].to_pylist() == [63]


@pytest.mark.parametrize("other", ["run.gk", "link.gk", "run.gk-wal"])
def test_a_table_does_not_overwrite_the_record(run: Run, tmp_path: Path, other: str) -> None:
    (tmp_path / "link.gk").symlink_to(tmp_path / "run.gk")
    with pytest.raises(ValueError, match=rf"to_csv: .*{other} is the record itself, which would be lost"):
        run.to_csv(tmp_path / other)
    assert run.steps.tolist() == [0, 1, 2, 3]


def test_the_directory_of_a_table_is_made(run: Run, tmp_path: Path) -> None:
    run.to_csv(tmp_path / "tables" / "of" / "out.csv")
    assert read(tmp_path / "tables" / "of" / "out.csv")[0] == ["step", "loss", "lr"]
