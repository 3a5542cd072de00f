"""Every kernel against the oracle, on any device: sizes at the edges, alignments, non-finite elements."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import gradkern
from gradkern import ops
from gradkern.selftest import oracle

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Around the width of a load, of a block's share, and of a chunk of the CPU and the CUDA kernels.
SIZES = (0, 1, 2, 7, 8, 9, 31, 33, 1023, 1025, 4097, 16383, 16384, 16385, 65535, 65537, 300_001)
NORM_ERROR = {"cpu": 1e-12, "cuda": 1e-6}  # relative; 1e-12 for float64 everywhere


def random(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """Normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype).to(device)


def odd(numel: int, dtype: torch.dtype, device: str) -> Tensor:
    """Normal numbers at an address that is a multiple of the element's size and no more."""
    return random(numel + 1, dtype=dtype, device=device)[1:]


def check_rows(rows: Tensor, grads: list[Tensor], context: object = "") -> None:
    """Counts and largest magnitudes exactly, norms within the promise."""
    wanted = oracle.rows(grads)
    found = rows.cpu()
    assert torch.equal(found[:, 1:], wanted[:, 1:]), f"{context}: {found.tolist()}, not {wanted.tolist()}"
    for grad, norm, right in zip(grads, found[:, 0].sqrt(), wanted[:, 0].sqrt(), strict=True):
        error = 1e-12 if grad.dtype == torch.float64 else NORM_ERROR[grad.device.type]
        assert abs(norm - right) <= error * right, f"{context}: norm {norm.item()}, not {right.item()}"


def same(found: Tensor, wanted: Tensor) -> bool:
    """Element for element; a NaN is as good as another."""
    return found.dtype == wanted.dtype and torch.equal(_comparable(found.cpu()), _comparable(wanted))


def _comparable(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), 12345.0, x.double())


def sizes_dtypes_alignments(device: str) -> str:
    """Lengths and addresses at which loads and chunks begin and end."""
    for dtype in DTYPES:
        for numel in SIZES:
            for grad in (random(numel, dtype=dtype, device=device), odd(numel, dtype, device)):
                check_rows(ops.measure([grad])[0], [grad], (dtype, numel))
    return f"{len(SIZES)} sizes, {len(DTYPES)} dtypes, aligned and not"


def extreme_values(device: str) -> str:
    """What float32 sums would lose, and squares overflow or vanish."""
    values = (1.0, 0.1, 1 / 3, 1e-20, 1e-30, 1e-38, 1e18, 3e38, 6e-8, 65504.0)
    for dtype in DTYPES:
        for value in values:
            grad = torch.full((70_000,), value, dtype=torch.float64).to(dtype).to(device)
            check_rows(ops.measure([grad])[0], [grad], (dtype, value))
    return "constants from subnormal to the largest"


def nonfinite_elements(device: str) -> str:
    """Counted exactly, and left out of the sums, wherever they are."""
    for dtype in DTYPES:
        for at in (0, 1, 15, 16, 4095, 20_000, 40_001):
            for value in (math.nan, math.inf, -math.inf):
                grad = odd(40_002, dtype, device)
                grad[at] = value
                check_rows(ops.measure([grad])[0], [grad], (dtype, at, value))
    return "NaN and Inf, first to last element"


def lists(device: str) -> str:
    """Each way in which addresses reach the GPU, and lists known from the call before."""
    counts = (1, 2, 448, 449, 4000, 4001)
    for count in counts:
        grads = [
            random(index % 7, dtype=DTYPES[index % 4], device=device, seed=index) for index in range(count)
        ]
        for _ in range(2):  # the second time the shapes are known
            rows, total = ops.measure(grads)
            check_rows(rows, grads, count)
            right, found = oracle.rows(grads), total.cpu()
            assert torch.equal(found[2:], right.sum(0)[2:]), f"counts of {count} tensors"
            assert found[1] == right[:, 1].max(), f"largest magnitude of {count} tensors"
            norm, wanted = found[0].sqrt(), right[:, 0].sum().sqrt()
            assert abs(norm - wanted) <= NORM_ERROR[device] * wanted, f"norm of {count} tensors"
    return f"{counts[0]} to {counts[-1]} tensors, dtypes mixed, some empty"


def clipping(device: str) -> str:
    """Every element that is written, under each word for what is not finite."""
    words = ("keep", "zero", "propagate")
    for dtype in DTYPES:
        for nonfinite in words:
            for max_norm, clip_value in ((0.5, math.inf), (1e9, math.inf), (math.inf, 0.25), (0.5, 0.001)):
                for value in (None, math.nan, math.inf):
                    grads = [odd(20_001, dtype, device), random(130, 70, dtype=dtype, device=device)]
                    if value is not None:
                        grads[0][7], grads[1][129, 69] = value, -value
                    before = [grad.cpu().clone() for grad in grads]
                    rows, _, coef = ops.clip_(grads, max_norm, None, 0.0, clip_value, nonfinite)
                    check_rows(rows, before if device == "cpu" else [grad.to(device) for grad in before])
                    for grad, old in zip(grads, before, strict=True):
                        wanted = oracle.clipped(old, coef.item(), clip_value, nonfinite)
                        context = (dtype, nonfinite, max_norm, clip_value, value)
                        assert same(grad, wanted), f"{context}: a written element is wrong"
    return f"{', '.join(words)}; by norm, by value, by both, and not at all"


def coefficients(device: str) -> str:
    """A coefficient for each tensor."""
    for dtype in DTYPES:
        grads = [random(3000, dtype=dtype, device=device, seed=seed) for seed in range(3)]
        before = [grad.cpu().clone() for grad in grads]
        coef = torch.tensor([0.5, 1.0, 0.3], dtype=torch.float64, device=device)
        ops.apply_(grads, None, coef, math.inf, "keep")
        for grad, old, factor in zip(grads, before, coef.tolist(), strict=True):
            assert same(grad, oracle.clipped(old, factor, math.inf, "keep")), f"{dtype}: factor {factor}"
    return "one for each tensor"


def units(device: str) -> str:
    """Sums and coefficients of slices, shorter and longer than a chunk."""
    shapes = ((5, 3), (64, 1), (3, 70_000), (17, 4, 3, 3), (9,), (2, 0))
    for dtype in DTYPES:
        tensors = [random(*shape, dtype=dtype, device=device) for shape in shapes]
        wanted = torch.cat([oracle.unit_sums(tensor) for tensor in tensors])
        found = ops.unit_sums(tensors).cpu()
        error = 1e-12 if device == "cpu" or dtype == torch.float64 else 2e-6
        assert torch.allclose(found, wanted, rtol=error, atol=0), f"{dtype}: {found} not {wanted}"
        before = [tensor.cpu().clone() for tensor in tensors]
        coef = torch.linspace(0.1, 1.0, len(wanted), dtype=torch.float64)
        ops.apply_units_(tensors, coef.to(device), math.inf, "keep")
        factors = iter(coef.tolist())
        for tensor, old in zip(tensors, before, strict=True):
            slices = list(zip(tensor, old, strict=True)) if tensor.dim() > 1 else [(tensor, old)]
            for new_unit, old_unit in slices:
                wanted_unit = oracle.clipped(old_unit, next(factors), math.inf, "keep")
                assert same(new_unit, wanted_unit), f"{dtype}: a unit of {list(tensor.shape)}"
    return "sums and coefficients"


def exponents(device: str) -> str:
    """Histograms of exponents, the ends included."""
    if not has_kernels(device):
        return SKIP + "only the kernels have it"
    for dtype in DTYPES:
        generator = torch.Generator().manual_seed(1)
        powers = torch.randint(-50, 20, (5001,), generator=generator).double()
        values = torch.randn(5001, dtype=torch.float64, generator=generator) * 2.0**powers
        values[::50], values[1], values[2], values[3] = 0.0, math.nan, math.inf, 2.0**-24
        grad = values.to(dtype).to(device)
        found = torch.ops.gradkern.exponents([grad]).cpu().tolist()
        assert found == [oracle.exponents(grad)], f"{dtype}: {found}"
    return "histogram"


def penalty(device: str) -> str:
    """The penalty's value, and its gradient added."""
    for dtype in (torch.float32, torch.float64):
        grad, weight = (random(20_001, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
        g, w = oracle.on_cpu(grad), oracle.on_cpu(weight)
        value = ops.add_penalty_([grad], [weight], 0.01, 0.1)
        wanted = g + 0.01 * w.sign() + 0.2 * w
        rounding = 4 * torch.finfo(dtype).eps  # three terms
        assert torch.allclose(oracle.on_cpu(grad), wanted, rtol=rounding, atol=rounding), f"{dtype}: gradient"
        right = (0.01 * w.abs() + 0.1 * w.square()).sum().item()
        error = 1e-12 if dtype == torch.float64 or device == "cpu" else 1e-6
        assert abs(value.item() - right) <= error * right, f"{dtype}: {value.item()}, not {right}"
    return "value and gradient"


def as_torch(device: str) -> str:
    """A function with torch's signature, against torch's."""
    for dtype in (torch.float32, torch.float64):
        mine, torchs = (
            [torch.nn.Parameter(torch.zeros(999, dtype=dtype, device=device)) for _ in range(4)] for _ in "ab"
        )
        for seed, (one, other) in enumerate(zip(mine, torchs, strict=True)):
            one.grad = random(999, dtype=dtype, device=device, seed=seed)
            other.grad = one.grad.clone()
        norm = gradkern.clip_grad_norm_(mine, 1.0)
        wanted = torch.nn.utils.clip_grad_norm_(torchs, 1.0)
        torch.testing.assert_close(norm, wanted)
        for one, other in zip(mine, torchs, strict=True):
            torch.testing.assert_close(one.grad, other.grad)
    return "clip_grad_norm_ agrees with torch's"


def repeatable(device: str) -> str:
    """The same gradients give the same bits."""
    grads = [odd(numel, dtype, device) for numel in (300_001, 77) for dtype in DTYPES]
    rows, total = ops.measure(grads)
    for _ in range(20):
        again_rows, again_total = ops.measure(grads)
        assert torch.equal(rows, again_rows), "rows differ between two runs"
        assert torch.equal(total, again_total), "totals differ between two runs"
    return "20 runs, the same bits"


SKIP = "skipped: "
CHECKS: dict[str, Callable[[str], str]] = {
    "statistics": sizes_dtypes_alignments,
    "extreme values": extreme_values,
    "non-finite elements": nonfinite_elements,
    "long and mixed lists": lists,
    "clipping": clipping,
    "coefficients": coefficients,
    "units": units,
    "exponents": exponents,
    "penalty": penalty,
    "torch's functions": as_torch,
    "repeatable": repeatable,
}


def has_kernels(device: str) -> bool:
    """Whether the kernels, rather than the reference, work on the device."""
    return ops.has_kernels(torch.device(device))


def devices() -> Iterator[str]:
    """The CPU, and the first GPU if torch can use one."""
    yield "cpu"
    if torch.cuda.is_available():
        yield "cuda"
