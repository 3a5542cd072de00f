from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import gradkern
from gradkern import ops, reference
from tests.backends import Backend
from tests.helpers import (
    HALVES,
    INF,
    NAN,
    REAL,
    elements,
    exact_norm,
    exact_sum_sq,
    randn,
    round_to,
    same_bits,
)

# At the edges of lanes, of the kernels' chunks (2**16) and of the reference's slices (2**14).
SIZES = [0, 1, 2, 15, 16, 17, 31, 32, 33, 2**14 - 1, 2**14, 2**14 + 1, 2**16 - 1, 2**16, 2**16 + 1, 2**20]


def float64(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("numel", SIZES)
def test_statistics_of_random_numbers_are_those_of_float64(
    numel: int, dtype: torch.dtype, backend: Backend
) -> None:
    grad = randn(numel, dtype=dtype)
    values = elements([grad])
    rows, total = ops.measure([grad])
    sum_sq, abs_max, nan_count, inf_count, zero_count = rows[0].tolist()
    assert sum_sq == pytest.approx(exact_sum_sq(values), rel=1e-12, abs=0)
    assert abs_max == np.abs(values).max(initial=0)
    assert (nan_count, inf_count, zero_count) == (0, 0, np.count_nonzero(values == 0))
    assert total.tolist() == rows[0].tolist()


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("numel", [17, 2**16 + 1, 2**20])
def test_sum_of_squares_of_a_constant_does_not_drift(
    numel: int, dtype: torch.dtype, backend: Backend
) -> None:
    grad = torch.full((numel,), 1.411, dtype=dtype)
    expected = numel * grad[0].item() ** 2
    assert ops.measure([grad])[1][0].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_denormals_count_in_full(dtype: torch.dtype, backend: Backend) -> None:
    tiny = torch.finfo(dtype).smallest_normal / 4
    grad = torch.full((1000,), tiny, dtype=dtype)
    row = ops.measure([grad])[0][0]
    assert row[0].item() == pytest.approx(1000 * grad[0].item() ** 2, rel=1e-12, abs=0)
    assert row[1].item() == grad[0].item()
    assert row[4].item() == 0


@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_small_elements_count_beside_huge_ones(dtype: torch.dtype, backend: Backend) -> None:
    # 4096 times the smaller square is half a percent of the larger.
    grad = torch.tensor([1000.0, 0.001], dtype=dtype).repeat(50_000)
    assert ops.measure([grad])[1][0].item() == pytest.approx(exact_sum_sq(elements([grad])), rel=1e-12)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float32, 1e20),
        (torch.float32, 1e-25),
        (torch.float32, 3e38),
        (torch.bfloat16, 3e38),
        (torch.float16, 60000.0),
        (torch.float64, 1e150),
    ],
    ids=str,
)
def test_the_norm_neither_overflows_nor_vanishes(dtype: torch.dtype, value: float, backend: Backend) -> None:
    grad = torch.full((4096,), value, dtype=dtype)
    norm = reference.norm_of(ops.measure([grad])[1]).item()
    assert norm == pytest.approx(64 * grad[0].item(), rel=1e-12)


@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_non_finite_elements_and_zeros_are_counted_and_left_out(dtype: torch.dtype, backend: Backend) -> None:
    grad = randn(70_001, dtype=dtype)
    grad[::1000] = NAN
    grad[1::5000] = INF
    grad[2::7000] = -INF
    grad[3::3000] = -0.0
    values = elements([grad])
    finite = values[np.isfinite(values)]
    rows, _ = ops.measure([grad])
    assert rows[0].tolist() == [
        pytest.approx(exact_sum_sq(finite), rel=1e-12),
        np.abs(finite).max(),
        np.isnan(values).sum(),
        np.isinf(values).sum(),
        (values == 0).sum(),
    ]


def test_the_total_is_the_merge_of_all_rows(backend: Backend) -> None:
    grads = [randn(numel, seed=numel) for numel in (5, 0, 100, 70_000)]
    grads[2][7] = NAN
    rows, total = ops.measure(grads)
    assert total.tolist() == [
        pytest.approx(math.fsum(rows[:, 0].tolist()), rel=1e-14),
        rows[:, 1].max().item(),
        *rows[:, 2:].sum(0).tolist(),
    ]


def test_no_gradients_have_no_rows_and_the_total_of_nothing(backend: Backend) -> None:
    rows, total = ops.measure([])
    assert (rows.shape, total.tolist()) == ((0, 5), [0.0] * 5)
    _, _, coef = ops.clip_([], 1.0, None, 0.0, INF, "keep")
    assert coef.item() == 1


@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_every_element_is_the_exact_product_rounded_to_its_dtype(
    dtype: torch.dtype, backend: Backend
) -> None:
    grad = randn(70_001, dtype=dtype)
    before = elements([grad])
    coef = 0.123456789012345
    # Halves are multiplied in float32, with the coefficient rounded to it.
    if dtype in HALVES:
        expected = round_to((before.astype(np.float32) * np.float32(coef)).astype(np.float64), dtype)
    else:
        expected = round_to(before * coef, dtype)
    ops.apply_([grad], None, float64(coef), INF, "keep")
    assert np.array_equal(elements([grad]), expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_coefficient_below_the_normal_float32_keeps_its_precision(
    dtype: torch.dtype, backend: Backend
) -> None:
    coef = 1.2345e-43
    grad = torch.full((40,), torch.finfo(dtype).max, dtype=dtype)
    expected = round_to(np.float64(grad[0].item() * coef).reshape(1), dtype)[0]
    ops.apply_([grad], None, float64(coef), INF, "keep")
    assert grad.tolist() == [expected] * 40


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("coef", [1.0, 0.5])
def test_elements_are_clamped_to_the_bound_as_their_dtype_has_it(
    coef: float, dtype: torch.dtype, backend: Backend
) -> None:
    grad = torch.tensor([-3.0, -0.05, -0.0, 0.0, 0.05, 3.0], dtype=dtype)
    bound = torch.tensor(0.1, dtype=dtype).item()
    middle = torch.tensor([0.05 * coef], dtype=torch.float64).to(dtype).item()
    ops.apply_([grad], None, float64(coef), 0.1, "keep")
    assert grad.tolist() == pytest.approx([-bound, -middle, 0, 0, middle, bound], rel=1e-2)
    assert grad[[0, -1]].tolist() == [-bound, bound]


def test_negative_zero_keeps_its_sign(backend: Backend) -> None:
    grad = torch.tensor([-0.0, 2.0, -4.0])
    ops.apply_([grad], None, float64(0.5), 1.5, "keep")
    assert same_bits(grad, torch.tensor([-0.0, 1.0, -1.5]))


@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_keep_leaves_every_bit_of_nan_and_inf(dtype: torch.dtype, backend: Backend) -> None:
    grad = torch.tensor([4.0, NAN, INF, -INF, -NAN], dtype=dtype).repeat(41)
    bits = grad.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[grad.element_size()])
    bits[1] -= 3  # a signalling NaN with a payload in place of the usual one, or an Inf's neighbour
    bits[1] |= 1
    before = grad.clone()
    assert before.isnan().sum() == 82
    ops.apply_([grad], None, float64(0.25), 0.5, "keep")
    expected = torch.where(before.isfinite(), torch.full_like(before, 0.5), before)
    assert same_bits(grad, expected)


@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_zero_replaces_nan_and_inf_by_positive_zero(dtype: torch.dtype, backend: Backend) -> None:
    grad = torch.tensor([4.0, NAN, INF, -INF, -2.0], dtype=dtype).repeat(41)
    ops.apply_([grad], None, float64(0.25), INF, "zero")
    assert same_bits(grad, torch.tensor([1.0, 0.0, 0.0, 0.0, -0.5], dtype=dtype).repeat(41))


@pytest.mark.parametrize("coef", [0.5, 0.0, NAN])
@pytest.mark.parametrize("bound", [0.75, INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_propagate_is_the_arithmetic_of_torch(
    dtype: torch.dtype, bound: float, coef: float, backend: Backend
) -> None:
    grad = torch.tensor([4.0, NAN, INF, -INF, -2.0, 1.0], dtype=dtype).repeat(41)
    expected = grad.clone().mul_(coef).clamp_(-bound, bound)
    ops.apply_([grad], None, float64(coef), bound, "propagate")
    assert torch.equal(grad, expected) or (
        torch.equal(grad.isnan(), expected.isnan()) and torch.equal(grad.nan_to_num(), expected.nan_to_num())
    )


@pytest.mark.parametrize("nonfinite", ["keep", "zero", "propagate"])
@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_a_coefficient_of_1_changes_no_bit_and_no_version(
    dtype: torch.dtype, nonfinite: str, backend: Backend
) -> None:
    grad = randn(40_000, dtype=dtype)
    before, version = grad.clone(), grad._version
    rows, _ = ops.measure([grad])
    ops.apply_([grad], rows, float64(1.0), 1e4, nonfinite)
    assert same_bits(grad, before)
    assert grad._version == version


def test_without_rows_too_a_coefficient_of_1_writes_nothing(backend: Backend) -> None:
    grad = torch.tensor([NAN, 1.0])
    version = grad._version
    ops.apply_([grad], None, float64(1.0), INF, "keep")
    ops.apply_([grad], None, float64(1.0), INF, "propagate")
    assert grad._version == version


def test_an_empty_gradient_is_never_counted_as_written(backend: Backend) -> None:
    grads = [torch.zeros(0), torch.ones(2)]
    for coef in (0.5, NAN):
        backend.apply_(grads, None, float64(coef), 0.25, "zero")
    assert [grad._version for grad in grads] == [0, 2]


def test_each_gradient_has_its_own_coefficient(backend: Backend) -> None:
    grads = [torch.full((3,), 8.0), torch.full((2,), 8.0), torch.full((1,), 8.0)]
    versions = [grad._version for grad in grads]
    rows, _ = ops.measure(grads)
    ops.apply_(grads, rows, torch.tensor([0.5, 1.0, 0.25], dtype=torch.float64), INF, "keep")
    assert [grad[0].item() for grad in grads] == [4.0, 8.0, 2.0]
    assert grads[1]._version == versions[1]
    assert grads[0]._version > versions[0]


def test_only_gradients_in_which_something_changes_are_written(backend: Backend) -> None:
    zeros, small, large = torch.zeros(5), torch.full((5,), 0.1), torch.full((5,), 3.0)
    versions = [grad._version for grad in (zeros, small, large)]
    ops.clip_([zeros, small, large], INF, None, 0.0, 0.5, "keep")
    assert [
        grad._version > version for grad, version in zip((zeros, small, large), versions, strict=True)
    ] == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("nonfinite", ["keep", "zero", "propagate"])
@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_kernels_and_reference_agree_on_every_bit(
    dtype: torch.dtype, nonfinite: str, native: Backend
) -> None:
    mine = randn(100_003, dtype=dtype)
    mine[17::9999] = NAN
    mine[18::9999] = -INF
    theirs = mine.clone()
    ops.apply_([mine], None, float64(0.37), 0.5, nonfinite)
    reference.apply_([theirs], None, float64(0.37), 0.5, nonfinite)
    assert torch.equal(mine.isnan(), theirs.isnan())
    assert torch.equal(mine.nan_to_num(123.0), theirs.nan_to_num(123.0))


@pytest.mark.parametrize("nonfinite", ["keep", "zero", "propagate"])
@pytest.mark.parametrize(("max_norm", "bound"), [(1.0, INF), (INF, 0.5), (2.0, 0.01), (1e9, 1e9)])
def test_clip_is_measure_decide_apply(
    max_norm: float, bound: float, nonfinite: str, backend: Backend
) -> None:
    once = [randn(300, seed=1), randn(7, 11, dtype=torch.bfloat16), randn(70_000, dtype=torch.float16)]
    apart = [grad.clone() for grad in once]
    clipped_rows, clipped_total, coef = ops.clip_(once, max_norm, None, 0.0, bound, nonfinite)
    rows, total = ops.measure(apart)
    assert torch.equal(clipped_rows, rows)
    assert torch.equal(clipped_total, total)
    assert coef.item() == pytest.approx(min(1.0, max_norm / exact_norm(apart)), rel=1e-15)
    ops.apply_(apart, rows, coef, bound, nonfinite)
    assert all(same_bits(one, other) for one, other in zip(once, apart, strict=True))


@pytest.mark.parametrize(
    "limit", [None, float64(2.0), torch.tensor(2.0)], ids=["number", "float64", "float32"]
)
def test_a_limit_may_be_a_number_or_a_tensor(limit: Tensor | None, backend: Backend) -> None:
    grad = torch.tensor([3.0, -4.0])
    _, _, coef = ops.clip_([grad], 2.0 if limit is None else INF, limit, 0.0, INF, "keep")
    assert coef.item() == 0.4
    assert grad.tolist() == torch.tensor([1.2, -1.6]).tolist()


MIXED = {
    "dense": lambda: randn(50),
    "half": lambda: randn(51, dtype=torch.bfloat16),
    "gaps": lambda: randn(40, 6)[:, ::2],
    "permuted": lambda: randn(4, 5, 6).permute(2, 0, 1),
    "complex": lambda: randn(30, dtype=torch.complex64),
    "sparse": lambda: randn(20, 3).to_sparse(1),
    "double": lambda: randn(9, dtype=torch.float64),
    "empty": lambda: torch.zeros(0),
}


def test_rows_of_a_mixed_list_are_in_its_order(backend: Backend) -> None:
    grads = [make() for make in MIXED.values()]
    rows, total = ops.measure(grads)
    apart = torch.cat([ops.measure([grad])[0] for grad in grads])
    assert torch.equal(rows, apart)
    assert total[0].item() == pytest.approx(math.fsum(rows[:, 0].tolist()), rel=1e-14)


@pytest.mark.parametrize("leader", list(MIXED))
def test_a_mixed_list_is_clipped_by_its_joint_norm(leader: str, backend: Backend) -> None:
    grads = [MIXED[leader]()] + [make() for name, make in MIXED.items() if name != leader]
    joint = math.sqrt(sum(grad.to_dense().to(torch.complex128).abs().square().sum().item() for grad in grads))
    before = [grad.clone() for grad in grads]
    _, _, coef = ops.clip_(grads, 1.0, None, 0.0, INF, "keep")
    assert coef.item() == pytest.approx(1 / joint, rel=1e-14)
    for grad, old in zip(grads, before, strict=True):
        rtol = 2**-8 if grad.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(grad.to_dense(), old.to_dense() / joint, rtol=rtol, atol=0)


def test_each_gradient_of_a_mixed_list_gets_its_own_coefficient(backend: Backend) -> None:
    grads = [
        torch.full((2,), 8.0),
        torch.full((2, 2), 8.0)[:, 0],
        torch.full((2,), 8.0, dtype=torch.complex64),
    ]
    rows, _ = ops.measure(grads)
    ops.apply_(grads, rows, torch.tensor([0.5, 0.25, 0.125], dtype=torch.float64), INF, "keep")
    assert [grad[0].real.item() for grad in grads] == [4.0, 2.0, 1.0]


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("measure", lambda grads: (grads,)),
        ("clip_", lambda grads: (grads, 0.5, None, 0.0, INF, "keep")),
        ("clip_", lambda grads: (grads, INF, float64(0.5), 1e-6, 0.25, "propagate")),
        ("apply_", lambda grads: (grads, None, float64(0.5), 0.25, "zero")),
        ("apply_", lambda grads: (grads, torch.ones(3, 5, dtype=torch.float64), float64(0.5), INF, "keep")),
    ],
)
def test_torch_finds_no_fault_with_the_operators(op: str, arguments: object, native: Backend) -> None:
    assert isinstance(arguments, types.FunctionType)
    grads = [randn(33), randn(4, 5, dtype=torch.bfloat16).t(), randn(0, dtype=torch.float64)]
    torch.library.opcheck(getattr(torch.ops.gradkern, op).default, arguments(grads))


def test_operators_run_on_fake_tensors_without_a_kernel(native: Backend) -> None:
    with FakeTensorMode():
        grads = [torch.empty(4, 5), torch.empty(7, dtype=torch.bfloat16)]
        rows, total, coef = ops.clip_(grads, 1.0, None, 0.0, INF, "keep")
    assert [(x.shape, x.dtype, x.device.type) for x in (rows, total, coef)] == [
        ((2, 5), torch.float64, "cpu"),
        ((5,), torch.float64, "cpu"),
        ((), torch.float64, "cpu"),
    ]


def test_a_limit_from_another_device_is_brought_to_the_gradients(native: Backend) -> None:
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: OpOverload, types: object, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            if func is torch.ops.gradkern.clip_.default:
                seen.append(args[2].device.type)
            return func(*args, **(kwargs or {}))

    with FakeTensorMode():
        grad, limit = torch.empty(4), torch.empty((), device="cuda")
        with Watch():
            ops.clip_([grad], INF, limit, 0.0, INF, "keep")
    assert seen == ["cpu"]


def test_numbers_from_another_device_are_left_to_python(native: Backend) -> None:
    """The dispatcher would choose that device's kernel; for meta tensors one that does nothing."""
    grad, number = torch.ones(3), torch.ones((), dtype=torch.float64, device="meta")
    rows = torch.ones(1, 5, dtype=torch.float64, device="meta")
    assert ops.native.clip_([grad], INF, number, 0.0, INF, "keep", True) is None
    assert not ops.native.apply_([grad], None, number, 0.25, "keep", True)
    assert not ops.native.apply_([grad], rows, float64(1.0), 0.25, "keep", True)
    assert (grad.tolist(), grad._version) == ([1.0] * 3, 0)


HALF = float64(0.5)
CALLS = {
    "measure": lambda grad: ops.native.measure([grad], True),
    "clip_": lambda grad: ops.native.clip_([grad], 1.0, None, 0.0, INF, "keep", True),
    "apply_": lambda grad: ops.native.apply_([grad], None, HALF, INF, "keep", True),
}


@pytest.mark.parametrize("call", CALLS)
def test_other_threads_run_while_large_gradients_are_worked_on(call: str, native: Backend) -> None:
    grad, go, ran = torch.ones(2**20), threading.Event(), []

    def wait() -> None:
        go.wait()
        ran.append(True)

    thread = threading.Thread(target=wait)
    interval = sys.getswitchinterval()
    thread.start()
    sys.setswitchinterval(3600)  # from here on the interpreter is only given away on purpose
    try:
        go.set()
        for _ in range(1000):
            CALLS[call](grad)
            if ran:
                break
        found = bool(ran)
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    assert found


@pytest.mark.parametrize(("device", "rows_device"), [("cuda", "cuda"), ("xpu", "xpu"), ("mps", "cpu")])
def test_rows_are_on_the_device_of_the_gradients_where_it_has_float64(device: str, rows_device: str) -> None:
    with FakeTensorMode():
        rows, total, coef = ops.clip_([torch.empty(4, device=device)], 1.0, None, 0.0, 0.5, "zero")
    assert {x.device.type for x in (rows, total, coef)} == {rows_device}


def test_the_backend_names_the_instruction_set(native: Backend) -> None:
    assert gradkern.backend().split(",")[0] == f"cpu {native.name}"


def test_the_backend_says_why_it_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "native", None)
    monkeypatch.setattr(ops, "_missing", "no C++ compiler was found: install g++")
    assert gradkern.backend() == "reference: no C++ compiler was found: install g++"


AGAIN = "install gradkern again with `pip install --no-build-isolation`"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (None, f"its extension has not been built: {AGAIN}"),
        ({"extension": False, "reason": "no C++ compiler was found"}, "no C++ compiler was found"),
        ({"extension": False}, f"it was installed without its extension: {AGAIN}"),
        (
            {"extension": True, "torch": "1.2"},
            "its extension was built for torch 1.2, and this is torch "
            + ".".join(torch.__version__.split(".")[:2])
            + f": {AGAIN}",
        ),
    ],
    ids=["never built", "with a reason", "without a reason", "another torch"],
)
def test_an_extension_that_does_not_fit_is_not_loaded(
    record: dict[str, object] | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if record is not None:
        (tmp_path / "_build.json").write_text(json.dumps(record))
    monkeypatch.setattr(ops, "__file__", str(tmp_path / "ops.py"))
    assert ops._load() == (None, reason)


def test_sources_without_a_build_say_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has installed the package and tries it in the same folder imports the sources."""
    (tmp_path / "csrc").mkdir()
    monkeypatch.setattr(ops, "__file__", str(tmp_path / "gradkern" / "ops.py"))
    assert ops._load() == (
        None,
        f"it was imported from its sources in {tmp_path}, where no extension has been built: run Python in "
        "another folder to use the installed package, or build here with "
        "`pip install --no-build-isolation --editable .`",
    )


def test_an_extension_that_fails_to_load_is_given_as_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = ".".join(torch.__version__.split(".")[:2])
    (tmp_path / "_build.json").write_text(json.dumps({"extension": True, "torch": running}))
    monkeypatch.setattr(ops, "__file__", str(tmp_path / "ops.py"))

    def fail(name: str) -> None:
        raise ImportError(f"{name}: undefined symbol")

    monkeypatch.setattr(ops.importlib, "import_module", fail)
    reason = f"its extension cannot be loaded (gradkern._C: undefined symbol): {AGAIN}"
    assert ops._load() == (None, reason)


@pytest.mark.parametrize(
    ("reason", "warned"),
    [
        ("no C++ compiler was found: install g++", True),
        ("it was installed with GRADKERN_BUILD=0: unset that", False),
    ],
)
def test_importing_without_an_extension_warns_once_unless_it_was_asked_for(
    reason: str, warned: bool, tmp_path: Path
) -> None:
    package = tmp_path / "gradkern"
    leave_out = shutil.ignore_patterns("_C*", "__pycache__")
    shutil.copytree(Path(gradkern.__file__).parent, package, ignore=leave_out)
    (package / "_build.json").write_text(json.dumps({"extension": False, "reason": reason}))
    code = "import gradkern, torch; print(gradkern.backend()); gradkern.measure_grads([torch.ones(3)])"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert found.stdout == f"reference: {reason}\n"
    message = f"gradkern computes with plain PyTorch, which is right but slow, because {reason}."
    assert found.stderr.count(message) == (1 if warned else 0)
    assert ("Warning" in found.stderr) == warned
