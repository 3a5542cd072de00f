"""Shows, on a machine without a GPU, that code neither reads a device on the host nor waits for it.

Inside `no_host_read()` everything raises `HostReadError` that a device would have to be waited for: reading
a value, copying from or to the host, an operation whose result has a shape that depends on values. With
FakeTensorMode, which gives tensors that say they are on "cuda" and hold no values, no GPU is needed; alone
it lets `.cpu()`, `.to("cpu")`, `cpu.copy_(cuda)` and printing pass.

    with FakeTensorMode():
        grad = torch.ones(3, device="cuda")       # set-up may copy
        with no_host_read():
            grad.mul_(grad.norm())                # fine
            grad.norm().item()                    # HostReadError

Beside a CPU-only torch, `tensor[...]`, `copy_` and `.to("cuda")` fail on fake CUDA tensors, for their
bindings ask for a CUDA device guard; `select`, `narrow` and `torch.where(..., out=)` do not. What a compiled
function does inside is not seen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that wait for the device to learn a value or the shape of their result.
_READS = frozenset(
    {
        "_local_scalar_dense",
        "_unique",
        "_unique2",
        "bincount",
        "equal",
        "is_nonzero",
        "item",
        "masked_select",
        "nonzero",
        "unique_consecutive",
        "unique_dim",
        "unique_dim_consecutive",
    }
)
_INDEXING = frozenset({"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"})
# Methods of Tensor that reach the host without an operation that a dispatch mode sees under fake tensors.
_METHODS = frozenset(
    {
        "__array__",
        "__bool__",
        "__complex__",
        "__contains__",
        "__float__",
        "__format__",
        "__index__",
        "__int__",
        "__repr__",
        "nonzero",
        "numpy",
        "tolist",
    }
)


class HostReadError(AssertionError):
    """The code would have waited for the device."""


class NoHostRead(TorchDispatchMode):
    """Rejects operations that read a device on the host, or copy between the two."""

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = func.overloadpacket.__name__
        if any(map(_on_device, tensors)):
            self._check_read(name, func, args, kwargs)
        if name in ("copy_", "_to_copy", "copy"):
            self._check_copy(name, args, kwargs)
        return func(*args, **kwargs)

    def _check_read(self, name: str, func: OpOverload, args: tuple, kwargs: dict) -> None:
        if name in _READS:
            raise HostReadError(f"{func} reads the device on the host")
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            raise HostReadError(f"{func} without output_size reads the device on the host")
        if name in _INDEXING:
            indices = [index for index in args[1] if isinstance(index, Tensor)]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                raise HostReadError(f"{func} with a mask reads on the host how many elements it selects")
            if not all(map(_on_device, indices)):
                raise HostReadError(f"{func} copies its index to the device")

    def _check_copy(self, name: str, args: tuple, kwargs: dict) -> None:
        if name == "_to_copy":
            source = args[0].device
            target = torch.device(kwargs.get("device") or source)
        else:
            target, source = args[0].device, args[1].device
        if (source.type == "cuda") != (target.type == "cuda"):
            raise HostReadError(f"{name} from {source} to {target} waits for the device")


class _NoHostMethods(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        name = getattr(func, "__name__", "")
        if name in _METHODS and args and isinstance(args[0], Tensor) and _on_device(args[0]):
            raise HostReadError(f"Tensor.{name} reads the device on the host")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_host_read() -> Iterator[None]:
    """Raise `HostReadError` where a tensor on "cuda", real or fake, is waited for."""
    with NoHostRead(), _NoHostMethods():
        yield


def _on_device(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"
