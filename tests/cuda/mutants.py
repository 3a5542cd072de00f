"""Broken variants of the kernels. The suite must fail for each of them: `test_mutants.py` sees to it."""

from __future__ import annotations

import shutil
from ctypes import CDLL
from dataclasses import dataclass
from pathlib import Path

from tests.cuda import kernels


@dataclass(frozen=True)
class Mutant:
    """In `file`, `old` (which occurs once) becomes `new`. Only `kernel` is tested."""

    name: str
    file: str
    old: str
    new: str
    kernel: str = "stats"
    first: str = ""  # how the names of tests go on that are worth trying first

    def build(self) -> CDLL:
        csrc = kernels.CACHE / "mutants" / self.name.replace(" ", "_")
        for folder in ("core", "cuda"):
            shutil.copytree(kernels.ROOT / "csrc" / folder, csrc / folder, dirs_exist_ok=True)
        _replace(csrc / "cuda" / self.file, self.old, self.new)
        # A kernel or two, for one kind of addresses, take a tenth of the time to compile.
        handles = csrc / "cuda/kernels.cu"
        _replace(handles, "return handle<kManyAddresses>(kernel)", "return nullptr")
        _replace(handles, "return handle<kFewAddresses>(kernel)", "return nullptr")
        for other in set(kernels.KERNELS) - {self.kernel, "stats"}:
            _replace(handles, f"reinterpret_cast<const void*>({other}_kernel<kCapacity>)", "nullptr")
        return kernels.build(csrc, strict=False)


def _replace(path: Path, old: str, new: str) -> None:
    source = path.read_text()
    if source.count(old) != 1:
        raise ValueError(f"{path}: {old!r} occurs {source.count(old)} times")
    path.write_text(source.replace(old, new))


MUTANTS = [
    # Order within a block.
    Mutant(
        "no barrier in the tree",
        "block.cuh",
        "    __syncthreads();\n    if (thread < half)",
        "    if (thread < half)",
    ),
    Mutant(
        "no barrier after the ticket", "block.cuh", "  __syncthreads();\n  return last;", "  return last;"
    ),
    Mutant(
        "no barrier before sums are reused",
        "block.cuh",
        "  __syncthreads();  // the slots may be written again\n",
        "",
        "unit_sums",
    ),
    Mutant(
        "barrier in a branch",
        "block.cuh",
        "  __syncthreads();\n  return last;",
        "  if (threadIdx.x > 0) __syncthreads();\n  return last;",
    ),
    Mutant(
        "histograms counted before they are clear",
        "exponents.cuh",
        "histograms[c] = 0;\n  __syncthreads();",
        "histograms[c] = 0;",
        "exponents",
    ),
    Mutant(
        "histograms read before all are counted",
        "exponents.cuh",
        "  });\n  __syncthreads();",
        "  });",
        "exponents",
    ),
    Mutant("half the lanes in the mask", "block.cuh", "0xffffffffu", "0x0000ffffu"),
    Mutant(
        "shuffles of half the width",
        "block.cuh",
        "distance = kWarp / 2; distance > 0; distance /= 2) {\n    mine +=",
        "distance = kWarp / 4; distance > 0; distance /= 2) {\n    mine +=",
        "unit_sums",
    ),
    # Order between blocks.
    Mutant(
        "no fence before the ticket",
        "block.cuh",
        "    __threadfence();\n    const uint32_t before",
        "    const uint32_t before",
    ),
    Mutant(
        "no fence after the ticket", "block.cuh", "- 1;\n    if (last) __threadfence();\n  }", "- 1;\n  }"
    ),
    Mutant(
        "ticket not reset",
        "block.cuh",
        "atomicInc(tickets, static_cast<uint32_t>(count) - 1)",
        "atomicAdd(tickets, 1u)",
    ),
    Mutant(
        "empty tensors are waited for",
        "stats.cuh",
        "plan.filled_count)) return;",
        "plan.tensor_count)) return;",
    ),
    Mutant(
        "coefficient read before it is written",
        "stats.cuh",
        "const double coef = clip_coef(total, max_norm, finish.eps, finish.nonfinite);",
        "const double coef = *finish.coef;",
    ),
    # Where elements are.
    Mutant(
        "one vector too many",
        "elements.cuh",
        "team.size < vectors;\n      batch",
        "team.size <= vectors;\n      batch",
    ),
    Mutant(
        "one element of the tail left out",
        "elements.cuh",
        "const int peeled = length - vectors * kWidth<T>;",
        "const int peeled = length - vectors * kWidth<T> - (vectors > 0);",
    ),
    Mutant(
        "vectors from an unaligned address",
        "elements.cuh",
        "const int to_boundary = (kWidth<T> - misaligned) % kWidth<T>;",
        "const int to_boundary = 0 * misaligned;",
    ),
    Mutant(
        "offset in 32 bits",
        "elements.cuh",
        "static_cast<float*>(data) + offset",
        "static_cast<float*>(data) + static_cast<int>(offset)",
        first="every",
    ),
    Mutant(
        "vectors written to the wrong place",
        "clip.cuh",
        "store(batch.at + k * batch.stride, now);",
        "store(batch.at + k, now);",
        "value",
    ),
    Mutant(
        "units from the first of the tensor", "units.cuh", "work(first + unit,", "work(unit,", "unit_sums"
    ),
    # What is computed.
    Mutant(
        "padding counted as zeros",
        "stats.cuh",
        "static_cast<uint32_t>(zeros) - padding",
        "static_cast<uint32_t>(zeros)",
    ),
    Mutant(
        "one long float32 sum",
        "stats.cuh",
        "sums[k] = fma(x, x, sums[k]);",
        "sums[0] = fma(x, x, sums[0]);",
        first="stats_of_a_constant",
    ),
    Mutant(
        "vanished sums kept",
        "stats.cuh",
        "if (sum >= kSmallestSum<T> && finite(sum))",
        "if (finite(sum))",
        first="stats_neither",
    ),
    Mutant(
        "overflown sums kept",
        "stats.cuh",
        "if (sum >= kSmallestSum<T> && finite(sum))",
        "if (sum >= kSmallestSum<T>)",
        first="stats_neither",
    ),
    Mutant(
        "batches with NaN not clamped",
        "stats.cuh",
        "largest > bound || !finite(largest)",
        "largest > bound",
        "value",
    ),
    Mutant(
        "product in float32",
        "clip.cuh",
        "static_cast<Real<T>>(static_cast<double>(x) * coef)",
        "x * static_cast<Real<T>>(coef)",
        "apply",
    ),
    Mutant(
        "NaN multiplied",
        "clip.cuh",
        "nonfinite != NonFinite::kPropagate && !finite(x)",
        "nonfinite == NonFinite::kZero && !finite(x)",
        "apply",
    ),
    Mutant(
        "never returns at once",
        "apply.cuh",
        "if (!changes(action, known_stats(args, chunk.tensor))) return;",
        "",
        "apply",
    ),
    Mutant(
        "chunks from the first",
        "apply.cuh",
        "args.plan.chunks[args.plan.chunk_count - 1 - i]",
        "args.plan.chunks[i]",
        "apply",
    ),
    Mutant("every write is made", "clip.cuh", "k < batch.count && changed", "k < batch.count", "value"),
    Mutant("gradient of the penalty halved", "penalty.cuh", "2 * l2 * w", "l2 * w", "penalty"),
]
