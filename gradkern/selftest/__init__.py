"""Try gradkern on this machine: every kernel against an oracle, and on a GPU its promises and its speed.

    python -m gradkern.selftest [--json selftest.json] [--no-speed]

Runs what can be run here and says of the rest why not. It ends with one table and one JSON file, whose fields
on hardware and software make the runs of different people comparable. Made to take less than ten minutes. It
exits with 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import gradkern
from gradkern import ops
from gradkern.selftest import speed
from gradkern.selftest.checks import CHECKS, SKIP, devices
from gradkern.selftest.promises import PROMISES

NO_GPU = "torch sees no GPU here"
# More than this of a device's memory is not asked for.
_SHARE_OF_MEMORY = 0.8


@dataclass(frozen=True)
class Result:
    """Of one check."""

    name: str
    device: str
    outcome: str  # ok, FAILED, skipped
    detail: str
    seconds: float


def environment() -> dict[str, object]:
    """Hardware and software, as far as they matter."""
    found: dict[str, object] = {
        "gradkern": gradkern.__version__,
        "backend": gradkern.backend(),
        "cuda_kernels": None if ops.native is None else ops.native.cuda_compiled_for(),
        "stream_route": None if ops.native is None else ops.native.stream_route(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpus": torch.cuda.device_count(),
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found.update(
            gpu=gpu.name,
            gpu_architecture=f"sm_{gpu.major}{gpu.minor}",
            gpu_memory_bytes=gpu.total_memory,
            gpu_sm_count=gpu.multi_processor_count,
            gpu_l2_bytes=getattr(gpu, "L2_cache_size", None),
        )
    return found


def run_check(name: str, device: str, check: Callable[[], str]) -> Result:
    """What became of a check."""
    began = time.perf_counter()
    try:
        detail = check()
        outcome = "ok"
        if detail.startswith(SKIP):
            outcome, detail = "skipped", detail.removeprefix(SKIP)
    except Exception as error:
        outcome, detail = "FAILED", f"{type(error).__name__}: {error}"
    result = Result(name, device, outcome, detail, time.perf_counter() - began)
    print(f"  {outcome:7} {device:5} {name:26} {detail}")
    return result


def run_checks() -> list[Result]:
    """Every kernel on every device, then what only a GPU can show."""
    results = []
    for device in devices():
        for name, check in CHECKS.items():
            results.append(run_check(name, device, lambda check=check, device=device: check(device)))  # type: ignore[misc]
    for name, promise in PROMISES.items():
        available = torch.cuda.is_available()
        results.append(run_check(name, "cuda", promise if available else lambda: SKIP + NO_GPU))
    return results


def run_speed() -> tuple[float | None, list[speed.Row]]:
    """Copy bandwidth of the first GPU in GB/s, and the rows."""
    if not torch.cuda.is_available():
        print(f"  skipped: {NO_GPU}, and the CPU has its own benchmark (make bench)")
        return None, []
    copy_gb_s = speed.copy_bandwidth("cuda")
    rows = []
    for workload in speed.WORKLOADS:
        if workload.nbytes > _SHARE_OF_MEMORY * torch.cuda.mem_get_info()[0]:
            print(f"  skipped: {workload.name} needs {workload.nbytes >> 30} GiB")
            continue
        rows += speed.measure_rows("cuda", workload, copy_gb_s)
        torch.cuda.empty_cache()
    return copy_gb_s, rows


def table(copy_gb_s: float, rows: Sequence[speed.Row]) -> str:
    """The rows, as Markdown."""
    lines = [
        f"Copy bandwidth {copy_gb_s:.0f} GB/s. `of copy`: bytes at the floor (one read; if clipped, one more "
        "and one write) per second, as a share of it.",
        "",
        "| gradients | situation | | ms | spread | GB/s at the floor | of copy |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        lines.append(
            f"| {row.workload} | {row.situation} | {row.contender} | {row.ms:.3f} | {row.spread:.0%} | "
            f"{row.floor_gb_s:.0f} | {row.of_copy:.0%} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all of it; 1 if anything failed."""
    parser = argparse.ArgumentParser("gradkern.selftest", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("selftest.json"), help="where the results go")
    parser.add_argument("--no-speed", action="store_true", help="only what is right and wrong")
    options = parser.parse_args(arguments)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `backend` says the same
        found = environment()
        for name, value in found.items():
            print(f"{name:18} {value}")
        print("\nright or wrong")
        results = run_checks()
        print("\nspeed")
        copy_gb_s, rows = (None, []) if options.no_speed else run_speed()
    if copy_gb_s is not None:
        print(table(copy_gb_s, rows))
    failed = [result for result in results if result.outcome == "FAILED"]
    skipped = [result for result in results if result.outcome == "skipped"]
    print(f"\n{len(results) - len(failed) - len(skipped)} right, {len(failed)} wrong, {len(skipped)} skipped")
    record = {
        "environment": found,
        "checks": [asdict(result) for result in results],
        "copy_gb_s": copy_gb_s,
        "speed": [asdict(row) for row in rows],
    }
    options.json.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written to {options.json}")
    return 1 if failed else 0
