"""The operators on a fake device "cuda", against the reference on the CPU. Run by test_cuda_ops.py.

It is a process of its own, because the fake device cannot be taken away again.
"""

from __future__ import annotations

import importlib
import math
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradkern import reference

fake: Any = None  # the module _fake_device, once this runs
kernels = torch.ops.gradkern
SCENARIOS: list[Callable[[], None]] = []


def scenario(body: Callable[[], None]) -> Callable[[], None]:
    SCENARIOS.append(body)
    return body


def gradients() -> list[Tensor]:
    """On the CPU: two dtypes, several chunks, an empty tensor, dense ones that are not contiguous."""
    torch.manual_seed(0)
    return [
        torch.randn(40_000),
        torch.randn(3, 5, dtype=torch.float64),
        torch.randn(0),
        torch.randn(6, 4).t(),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(()),
    ]


def uploaded(grads: list[Tensor]) -> list[Tensor]:
    return [fake.upload(grad) for grad in grads]


def versions(tensors: list[Tensor]) -> list[int]:
    return [tensor._version for tensor in tensors]


def close(found: Tensor, wanted: Tensor) -> None:
    fake.run()
    torch.testing.assert_close(fake.view(found), wanted, rtol=1e-12, atol=1e-12)


def same(found: list[Tensor], wanted: list[Tensor]) -> None:
    fake.run()
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(fake.view(one), other), f"{fake.view(one)} is not {other}"


@scenario
def measuring_agrees_with_the_reference() -> None:
    grads = gradients()
    there = uploaded(grads)
    for _ in range(2):
        rows, total = kernels.measure(there)
        assert rows.device == total.device == torch.device("cuda", 0)
        wanted_rows, wanted_total = reference.measure(grads)
        close(rows, wanted_rows)
        close(total, wanted_total)
    assert versions(there) == [0] * len(there)


@scenario
def clipping_agrees_with_the_reference() -> None:
    limit = torch.tensor(0.7, dtype=torch.float64)
    cases = [
        (1.0, None, math.inf),
        (math.inf, None, 0.25),
        (1.0, None, 0.001),
        (math.inf, None, math.inf),
        (1e9, None, math.inf),
        (math.inf, limit, math.inf),
        (math.inf, limit, 0.001),
    ]
    for max_norm, limit_given, clip_value in cases:
        for limit_on_device in (False, True):
            grads = gradients()
            there = uploaded(grads)
            limit_there = fake.upload(limit) if limit_given is not None and limit_on_device else limit_given
            rows, total, coef = kernels.clip_(there, max_norm, limit_there, 0.0, clip_value, "keep")
            wanted = reference.clip_(grads, max_norm, limit_given, 0.0, clip_value, "keep")
            for found, right in zip((rows, total, coef), wanted, strict=True):
                close(found, right)
            fake.run()
            for found, right in zip(there, grads, strict=True):
                torch.testing.assert_close(fake.view(found), right, rtol=1e-6, atol=0)


@scenario
def writes_are_counted_where_one_may_have_happened() -> None:
    for max_norm, clip_value, nonfinite, written in [
        (1.0, math.inf, "keep", 1),
        (math.inf, 0.5, "keep", 1),
        (math.inf, math.inf, "zero", 1),
        (math.inf, math.inf, "keep", 0),
        (math.inf, math.inf, "propagate", 0),
    ]:
        there = uploaded(gradients())
        kernels.clip_(there, max_norm, None, 0.0, clip_value, nonfinite)
        assert versions(there) == [written] * len(there), (max_norm, clip_value, nonfinite)
        fake.run()


@scenario
def clipping_by_norm_and_value_is_two_launches_by_value_alone_one() -> None:
    there = uploaded(gradients())
    kernels.measure(there)
    for max_norm, clip_value, launches in [
        (1.0, 0.5, 2),
        (1.0, math.inf, 2),
        (math.inf, 0.5, 1),
        (math.inf, math.inf, 1),
    ]:
        fake.clear_calls()
        kernels.clip_(there, max_norm, None, 0.0, clip_value, "keep")
        assert fake.calls().count("cudaLaunchKernel") == launches
        assert fake.calls().count("cudaMemcpyAsync") == 0
    fake.run()


@scenario
def coefficients_apply_to_all_or_each() -> None:
    for coef in (torch.tensor(0.5, dtype=torch.float64), torch.linspace(0.1, 1.0, 6, dtype=torch.float64)):
        for with_rows in (False, True):
            grads = gradients()
            there = uploaded(grads)
            rows = reference.measure(grads)[0] if with_rows else None
            kernels.apply_(there, None if rows is None else fake.upload(rows), fake.upload(coef), 0.9, "keep")
            reference.apply_(grads, rows, coef, 0.9, "keep")
            same(there, grads)
            assert versions(there) == [1] * len(there)


@scenario
def units_have_sums_and_coefficients() -> None:
    tensors = [
        torch.randn(5, 7),
        torch.randn(9),
        torch.randn(4, 0),
        torch.randn(3, 2, 2, dtype=torch.float64),
    ]
    there = uploaded(tensors)
    close(kernels.unit_sums(there), reference.unit_sums(tensors))
    coef = torch.linspace(0.1, 1.0, 13, dtype=torch.float64)
    kernels.apply_units_(there, fake.upload(coef), math.inf, "keep")
    reference.apply_units_(tensors, coef, math.inf, "keep")
    same(there, tensors)


@scenario
def units_that_are_apart_are_refused() -> None:
    there = uploaded([torch.randn(6, 4).t()])
    message = error_of(lambda: kernels.unit_sums(there))
    assert "do not lie one behind the other" in message, message


@scenario
def exponents_are_counted() -> None:
    there = uploaded([torch.tensor([1.0, 2.0, 3.0, 0.0, 0.25]), torch.empty(0)])
    counts = kernels.exponents(there)
    fake.run()
    found = fake.view(counts)
    assert found.shape == (2, 64)
    assert found[0, 0] == 1
    assert found[0, 3 + 44 : 3 + 46].tolist() == [1, 2]
    assert found[0, 3 + 42] == 1
    assert found.sum() == 5


@scenario
def a_penalty_is_added_and_valued() -> None:
    grads = [torch.randn(20_000), torch.randn(0), torch.randn(4, 3)]
    weights = [torch.randn(20_000), torch.randn(0), torch.randn(4, 3)]
    there = uploaded(grads)
    values = kernels.add_penalty_(there, uploaded(weights), 0.1, 0.2)
    fake.run()
    for found, grad, weight in zip(there, grads, weights, strict=True):
        torch.testing.assert_close(fake.view(found), grad + 0.1 * weight.sign() + 0.4 * weight)
    wanted = [(0.1 * w.double().abs() + 0.2 * w.double().square()).sum() for w in weights]
    close(values, torch.stack(wanted))


@scenario
def gradients_on_two_devices_are_refused() -> None:
    mixed = [fake.upload(torch.ones(3), 0), fake.upload(torch.ones(3), 1)]
    message = error_of(lambda: kernels.measure(mixed))
    assert "gradients on cuda:0 and cuda:1 need a call each" in message, message


@scenario
def numbers_on_another_device_are_refused() -> None:
    there = uploaded([torch.ones(3)])
    message = error_of(
        lambda: kernels.apply_(there, None, torch.tensor(0.5, dtype=torch.float64), 1.0, "keep")
    )
    assert "coef must be on cuda:0 as the gradients are, got cpu" in message, message


@scenario
def the_second_device_is_served_and_the_first_stays_current() -> None:
    there = [fake.upload(torch.full((3,), 2.0), 1)]
    rows, _ = kernels.measure(there)
    assert rows.device == torch.device("cuda", 1)
    fake.run(1)
    assert fake.view(rows)[0, 0] == 12.0
    assert kernels.measure(uploaded([torch.ones(2)]))[0].device == torch.device("cuda", 0)
    fake.run()


@scenario
def the_current_stream_is_used() -> None:
    there = uploaded([torch.ones(3)])
    first, _ = kernels.measure(there)
    fake.run()
    fake.new_stream(0)  # which becomes the current one
    second, _ = kernels.measure(there)
    fake.run()
    assert torch.equal(fake.view(first), fake.view(second))
    assert fake.stream_route() == "c10::Stream::native_handle"


@scenario
def a_torch_whose_streams_have_no_handle_is_asked_through_python() -> None:
    torch._C._cuda_getCurrentRawStream = lambda device: 4096 + device
    assert fake.old_route(3) == 4099


@scenario
def a_captured_call_is_replayed_with_values_of_then() -> None:
    fake.new_stream(0)
    other = uploaded([torch.ones(7)])
    fake.begin_capture()
    there = uploaded(gradients())
    rows, total, coef = kernels.clip_(there, 1.0, None, 0.0, math.inf, "keep")
    fake.end_capture()
    for seed in range(3):
        torch.manual_seed(seed)
        now = [torch.randn_like(grad) for grad in gradients()]
        for target, source in zip(there, now, strict=True):
            fake.view(target).copy_(source)
        fake.replay()
        between, _ = kernels.measure(other)
        fake.run()
        assert fake.view(between)[0, 0] == 7.0
        for found, right in zip(
            (rows, total, coef), reference.clip_(now, 1.0, None, 0.0, math.inf, "keep"), strict=True
        ):
            close(found, right)


@scenario
def a_full_device_says_what_the_memory_was_for() -> None:
    there = uploaded([torch.ones(100_000), torch.ones(5)])
    fake.new_stream(0)
    fake.lend_at_most(200)  # enough for the results, not for the tables
    try:
        kernels.measure(there)
    except torch.OutOfMemoryError as error:
        message = str(error)
    else:
        message = "no error"
    assert "the fake device is full" in message, message
    assert " bytes for the launch tables and partial sums of 2 tensors in 8 chunks" in message, message


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except (RuntimeError, ValueError, TypeError) as error:
        return str(error)
    return "no error"


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    fake = importlib.import_module("_fake_device")
    for body in SCENARIOS:
        try:
            body()
        except Exception:
            traceback.print_exc()
            print(f"FAILED {body.__name__}")
        else:
            print(f"ok     {body.__name__}")
