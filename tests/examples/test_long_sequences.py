from __future__ import annotations

import math
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "long_sequences.py"


@pytest.mark.skipif(not SCRIPT.exists(), reason="the examples are in the repository only")
def test_the_network_learns_while_it_reads(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pydoc_data.topics")
    main = runpy.run_path(str(SCRIPT))["main"]
    bits = main(["--readings", "1", "--steps", "25", "--characters", "64000"])
    assert len(bits) == 80
    assert all(map(math.isfinite, bits))
    assert bits[0] > 6.0
    assert sum(bits[-10:]) / 10 < 4.0
    assert "32 streams of 2000 characters, in chunks of 25" in capsys.readouterr().out
