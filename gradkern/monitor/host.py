"""Numbers on their way from the device to the host, without waiting for it."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float64]

# Elements of what is kept in lists.
SMALL: Final = 512


class Parcel:
    """Small tensors of one step, packed into one copy to the host.

    Of tensors on the CPU the values are there at once. Of those on another device one copy per device is
    started, into pinned memory and behind what the device still has to do; `open` waits for that copy alone.
    """

    def __init__(self) -> None:
        self._ready: dict[str, Floats] = {}
        self._here: list[tuple[str, Any]] = []
        self._away: dict[torch.device, list[tuple[str, Tensor]]] = {}
        self._sent: list[tuple[list[tuple[str, tuple[int, ...]]], Tensor, Any]] = []

    def put(self, name: str, tensor: Tensor) -> None:
        """Add a tensor, by value: it may be overwritten afterwards. Read on the host as float64."""
        tensor = tensor.detach()
        if tensor.is_cpu:
            values = kept(tensor)
            self._here.append((name, tensor.to(torch.float64, copy=True) if values is tensor else values))
        else:
            self._away.setdefault(tensor.device, []).append((name, tensor))

    @property
    def is_away(self) -> bool:
        """Whether anything comes from a device."""
        return bool(self._sent)

    @property
    def is_there(self) -> bool:
        """Whether `open` does not have to wait. Asks the device, without waiting for it."""
        return all(event is None or event.query() for _, _, event in self._sent)

    def send(self) -> None:
        """Start the copies."""
        for device, tensors in self._away.items():
            exact = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
            flat = torch.cat([tensor.to(exact).reshape(-1) for _, tensor in tensors])
            shapes = [(name, tuple(tensor.shape)) for name, tensor in tensors]
            copy = flat.to("cpu", non_blocking=device.type == "cuda")
            event = None
            if device.type == "cuda":
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(torch.cuda.current_stream(device))
            self._sent.append((shapes, copy, event))
        self._away = {}

    def open(self) -> dict[str, Floats]:
        """The values by name; waits for the copies."""
        self._ready.update((name, np.asarray(values, np.float64)) for name, values in self._here)
        self._here = []
        for shapes, copy, event in self._sent:
            if event is not None:
                event.synchronize()
            values, begin = copy.to(torch.float64).numpy(), 0
            for name, shape in shapes:
                size = int(np.prod(shape, dtype=np.int64))
                self._ready[name] = values[begin : begin + size].reshape(shape)
                begin += size
        self._sent = []
        return self._ready


def kept(tensor: Tensor) -> Any:
    """The values of a tensor on the CPU, to make an array of later: of a small one as lists, else itself.

    Lists are made in less time. And they do not lie among the memory that training takes and gives back in
    every step: small pieces that stay there for some steps keep the free ones around them apart.
    """
    return tensor.tolist() if 0 < tensor.numel() <= SMALL else tensor


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor can be read: strided, with values, no subclass, not inside torch.func."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and not tensor.is_meta
        and not tensor.is_quantized
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )
