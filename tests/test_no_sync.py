from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.no_sync import HostReadError, no_host_read

WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "int": lambda x: int(x.sum()),
    "bool": lambda x: bool(x.sum()),
    "if": lambda x: 1 if (x > 0).any() else 0,
    "index": lambda x: [0, 1, 2][x.long().sum()],
    "in": lambda x: 1.0 in x,
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "repr": repr,
    "str": str,
    "format": lambda x: f"{x}",
    "cpu": lambda x: x.cpu(),
    "to_cpu": lambda x: x.to("cpu"),
    "copy_to_cpu": lambda x: torch.zeros(3).copy_(x),
    "copy_from_cpu": lambda x: torch.ops.aten.copy_(x, torch.zeros(3)),
    "upload": lambda x: torch.ops.aten._to_copy(torch.ones(3), device="cuda"),
    "tensor_of_numbers": lambda x: torch.tensor([1.0, 2.0], device="cuda"),
    "nonzero": lambda x: torch.nonzero(x),
    "where_without_values": lambda x: torch.where(x > 0),
    "masked_select": lambda x: torch.masked_select(x, x > 0),
    "mask_index": lambda x: torch.ops.aten.index(x, [x > 0]),
    "mask_index_put": lambda x: torch.ops.aten.index_put_(x, [x > 0], x.sum()),
    "cpu_index": lambda x: torch.ops.aten.index(x, [torch.tensor([0])]),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
}

DOES_NOT_WAIT: dict[str, Callable[[Tensor], object]] = {
    "arithmetic": lambda x: (x * 2 + 1).sqrt().sum(),
    "where": lambda x: torch.where(x > 0, 1.0, x),
    "scalar_on_the_cpu": lambda x: x + torch.tensor(1.0),
    "full": lambda x: torch.full((3,), 1.0, device="cuda"),
    "index_select": lambda x: x.index_select(0, x.long()),
    "scatter": lambda x: x.scatter_(0, x.long(), x),
    "dtype": lambda x: x.double(),
    "copy_within": lambda x: torch.ops.aten.copy_(x, x.clone()),
    "shape": lambda x: (len(x), x.numel(), x.device),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_for_a_device_is_caught(name: str) -> None:
    with FakeTensorMode():
        x = torch.ones(3, device="cuda")
        with pytest.raises(HostReadError), no_host_read():
            WAITS[name](x)


@pytest.mark.parametrize("name", DOES_NOT_WAIT)
def test_what_only_launches_passes(name: str) -> None:
    with FakeTensorMode():
        x = torch.ones(3, device="cuda")
        with no_host_read():
            DOES_NOT_WAIT[name](x)


def test_the_host_may_read_its_own_tensors() -> None:
    with no_host_read():
        assert torch.ones(3).sum().item() == 3.0
        assert "tensor" in repr(torch.ones(3)[torch.tensor([True, False, True])])
