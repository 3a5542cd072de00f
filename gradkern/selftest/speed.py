"""How fast: gradkern and what else there is, in turn in one run, beside the device's copy bandwidth."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradkern import ops

MAX_NORM = 1.0
# Each row gets about this long, split among the contenders; at least so many rounds.
SECONDS_PER_ROW, ROUNDS = 8.0, 5


@dataclass(frozen=True)
class Workload:
    """A list of gradients."""

    name: str
    sizes: Sequence[int]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Of all gradients."""
        return sum(self.sizes) * self.dtype.itemsize


@dataclass(frozen=True)
class Row:
    """One contender on one workload. Times in ms, of the median round; bandwidth in GB/s."""

    workload: str
    situation: str
    contender: str
    ms: float
    spread: float  # (largest - smallest) / median of the rounds
    floor_gb_s: float  # bytes that cannot be avoided, per second
    of_copy: float  # the same, as a share of the copy bandwidth


def transformer(layers: int, width: int, inner: int, vocabulary: int) -> list[int]:
    """Sizes of the gradients of a decoder with gated MLPs and untied embeddings."""
    layer = [width * width] * 4 + [width * inner] * 3 + [width] * 2
    return [vocabulary * width, *layer * layers, width, vocabulary * width]


_GPT2_LAYER = [768, 768, 768 * 2304, 2304, 768 * 768, 768, 768, 768, 768 * 3072, 3072, 3072 * 768, 768]
WORKLOADS = (
    Workload("1000 tensors of 4", [4] * 1000, torch.float32),
    Workload("GPT-2 small, 124 M", [50257 * 768, 1024 * 768, *_GPT2_LAYER * 12, 768, 768], torch.float32),
    Workload("7B-parameter list", transformer(32, 4096, 11008, 32000), torch.bfloat16),
    Workload("one tensor of 1.5 B", [1_500_000_000], torch.bfloat16),
)


class Timer:
    """Times of device work, by events on a GPU and by the clock on the CPU."""

    def __init__(self, device: str) -> None:
        self.device = device

    def ms(self, work: Callable[[], object], repeats: int) -> float:
        """Mean of `repeats` calls in a row."""
        if self.device == "cpu":
            began = time.perf_counter()
            for _ in range(repeats):
                work()
            return (time.perf_counter() - began) * 1e3 / repeats
        start, end = _event(), _event()
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / repeats


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def copy_bandwidth(device: str, nbytes: int = 1 << 30) -> float:
    """GB/s, read and written together, of a copy within the device."""
    source, target = (torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
    timer = Timer(device)
    timer.ms(lambda: target.copy_(source), 3)
    return 2 * nbytes / min(timer.ms(lambda: target.copy_(source), 10) for _ in range(5)) / 1e6


def measure_rows(device: str, workload: Workload, copy_gb_s: float) -> list[Row]:
    """All contenders, with nothing to clip and with all to clip, on other gradients than the time before."""
    lists = [_gradients(workload, device)]
    if device == "cpu" or torch.cuda.mem_get_info()[0] > 2 * workload.nbytes:
        lists.append(_gradients(workload, device))
    # Two lists in turn stand for gradients that every step allocates anew.
    fresh = "other addresses each call" if len(lists) > 1 else "same addresses (memory for one list)"
    rows = []
    for situation, floor, contenders in (
        ("nothing to clip", 1, _contenders(device, 1e30)),
        ("clipped", 3, _contenders(device, MAX_NORM)),
    ):
        times = _in_turn(Timer(device), lists, contenders, rescale=floor > 1)
        for name, rounds in times.items():
            ms = statistics.median(rounds)
            gb_s = floor * workload.nbytes / ms / 1e6
            spread = (max(rounds) - min(rounds)) / ms
            rows.append(Row(workload.name, f"{situation}, {fresh}", name, ms, spread, gb_s, gb_s / copy_gb_s))
    return rows


Contender = Callable[[list[Tensor]], object]


def _gradients(workload: Workload, device: str) -> list[Tensor]:
    return [torch.full((size,), 1e-3, dtype=workload.dtype, device=device) for size in workload.sizes]


def _contenders(device: str, max_norm: float) -> dict[str, Contender]:
    """gradkern first. Those that are not installed are left out."""
    found: dict[str, Contender] = {
        "gradkern": lambda grads: ops.clip_(grads, max_norm, None, 0.0, float("inf"), "keep"),
        "torch foreach": lambda grads: _torch_clip(grads, max_norm),
    }
    if device == "cpu":
        return found
    compiled = torch.compile(_torch_clip, dynamic=False)
    found["torch.compile"] = lambda grads: compiled(grads, max_norm)
    for name, module, applier in (
        ("apex", "amp_C", "apex.multi_tensor_apply"),
        ("transformer engine", "transformer_engine_torch", "transformer_engine.pytorch.optimizers"),
    ):
        contender = _multi_tensor(module, applier, max_norm)
        if contender is not None:
            found[name] = contender
    return found


def _torch_clip(grads: list[Tensor], max_norm: float) -> Tensor:
    """What torch.nn.utils.clip_grad_norm_(foreach=True) does, on a list of gradients."""
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    torch._foreach_mul_(grads, torch.clamp(max_norm / (norm + 1e-6), max=1.0).to(grads[0].dtype))
    return norm


def _multi_tensor(module: str, applier: str, max_norm: float) -> Contender | None:
    """apex's norm and scale, which Transformer Engine has under the same names."""
    try:
        kernels = importlib.import_module(module)
        apply = importlib.import_module(applier).multi_tensor_applier
    except (ImportError, AttributeError):
        return None

    def clip(grads: list[Tensor]) -> Tensor:
        overflow = torch.zeros(1, dtype=torch.int32, device="cuda")
        norm: Tensor = apply(kernels.multi_tensor_l2norm, overflow, [grads], False)[0]
        coef = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        torch._foreach_mul_(grads, coef.reshape(()).to(grads[0].dtype))
        return norm

    return clip


def _in_turn(
    timer: Timer, lists: list[list[Tensor]], contenders: dict[str, Contender], rescale: bool
) -> dict[str, list[float]]:
    """Rounds of every contender, one after the other, so that none finds warmer caches or a cooler chip."""
    calls = 0

    def once(work: Contender) -> float:
        nonlocal calls
        calls += 1
        grads = lists[calls % len(lists)]
        if rescale:  # what the last call clipped
            torch._foreach_mul_(grads, 0.0)
            torch._foreach_add_(grads, 1e-1)
        return timer.ms(lambda: work(grads), 1)

    usable = {name: work for name, work in contenders.items() if _warmed_up(work, lists)}
    times: dict[str, list[float]] = {name: [] for name in usable}
    began = time.perf_counter()
    while any(len(found) < ROUNDS for found in times.values()) or (
        time.perf_counter() - began < SECONDS_PER_ROW and min(map(len, times.values())) < 50
    ):
        for name, work in usable.items():
            times[name].append(once(work))
    return times


def _warmed_up(work: Contender, lists: list[list[Tensor]]) -> bool:
    """Whether it works; compilers have then compiled, and shapes are known."""
    try:
        for _ in range(2):
            for grads in lists:
                work(grads)
    except Exception as error:
        print(f"  left out: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
        return False
    return True
