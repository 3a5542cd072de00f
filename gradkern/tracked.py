"""The named parameters that somebody looks after, followed from step to step."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from gradkern import ops
from gradkern.params import Params, as_items, collect

Item = tuple[str, Tensor]


class Tracked:
    """Parameters under names, each once: those of a module as it now is, or of a list as it was given.

    With an optimizer, only those that it steps, in the order of its groups; and those whose group has
    `clip_grad=False` are in `excluded` instead of `items`.

    Args:
        params: what `gradkern.clip_` takes.
        function: begins the messages of errors.
    """

    def __init__(self, params: Params, function: str) -> None:
        self.function = function
        self.optimizer: torch.optim.Optimizer | None = None
        self._module = params if isinstance(params, nn.Module) else None
        self._listed = [] if self._module is not None else _listed(params, function)
        self._containers: list[object] = []  # what was looked at, and below what was found in it
        self._found: list[object] = []
        self._settled = False
        self.items: list[Item] = []
        self.excluded: list[Item] = []
        self.refresh()

    @property
    def names(self) -> list[str]:
        """Names of the items."""
        return [name for name, _ in self.items]

    @property
    def params(self) -> list[Tensor]:
        """The items without their names."""
        return [param for _, param in self.items]

    def follow(self, optimizer: torch.optim.Optimizer | None) -> None:
        """From now on the parameters that `optimizer` steps; with None, all again.

        Raises:
            ValueError: it steps a parameter that is not among ours. Nothing has changed then.
        """
        before = self.optimizer
        self.optimizer = optimizer
        try:
            self._look()
        except ValueError:
            self.optimizer = before
            raise

    def refresh(self) -> bool:
        """Look again where parameters come from. True if some came or went, or were replaced."""
        if self._settled and _is_unchanged(self._sources(), self._found):
            return False
        self._look()
        return True

    def forget(self) -> None:
        """Let the next `refresh` find everything new."""
        self._settled = False

    def _sources(self) -> list[object]:
        """The containers whose contents decide, cheap to compare: no parameter is named."""
        if self.optimizer is not None:
            groups = self.optimizer.param_groups
            flags: list[object] = [group.get("clip_grad", True) for group in groups]
            return [flags, *(group["params"] for group in groups)]
        return self._containers

    def _look(self) -> None:
        known = self._known()
        if self.optimizer is None:
            self.items, self.excluded = known, []
        else:
            self.items, self.excluded = self._stepped(self.optimizer, known)
        self._found = list(chain.from_iterable(map(_contents, self._sources())))
        self._settled = True

    def _known(self) -> list[Item]:
        if self._module is None:
            return self._listed
        modules = list(self._module.modules())
        self._containers = [held for module in modules for held in (module._parameters, module._modules)]
        return list(self._module.named_parameters())

    def _stepped(
        self, optimizer: torch.optim.Optimizer, known: Sequence[Item]
    ) -> tuple[list[Item], list[Item]]:
        name_of = {param: name for name, param in known}
        items: list[Item] = []
        excluded: list[Item] = []
        for group_index, group in enumerate(optimizer.param_groups):
            for index, param in enumerate(group["params"]):
                if param not in name_of:
                    raise ValueError(
                        f"{self.function}: param_groups[{group_index}]['params'][{index}] of the "
                        f"{type(optimizer).__name__} ({list(param.shape)}) is not among the clipper's "
                        f"{len(name_of)} parameters.\nMake the Clipper of the module, or the parameters, "
                        "that the optimizer steps; each optimizer takes a Clipper of its own."
                    )
                (items if group.get("clip_grad", True) else excluded).append((name_of[param], param))
        return items, excluded


def _listed(params: Params, function: str) -> list[Item]:
    """Parameters that were not given as a module, each once, under their names."""
    items: list[Item] = []
    seen: set[Tensor] = set()
    for index, item in enumerate(as_items(params, function)):
        name, param = item if isinstance(item, tuple) and len(item) == 2 else (None, item)
        if not isinstance(param, Tensor):
            collect([item], function)  # raises, and says what is wrong
            continue
        if param not in seen:
            seen.add(param)
            items.append((f"parameters[{index}]" if name is None else str(name), param))
    return items


def _contents(container: object) -> Iterable[object]:
    return container.values() if isinstance(container, dict) else container  # type: ignore[return-value]


def _is_unchanged(containers: list[object], found: list[object]) -> bool:
    if ops.native is not None:
        return bool(ops.native.is_unchanged(containers, found))
    now = list(chain.from_iterable(map(_contents, containers)))
    return len(now) == len(found) and all(map(operator.is_, now, found))
