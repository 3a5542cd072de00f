"""Hooks that stay out of copies, and what belongs to no training step."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from gradkern.monitor.passes import Hook, aside, can_train


def hooked() -> tuple[nn.Module, list[int]]:
    calls: list[int] = []
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model[0].register_forward_pre_hook(Hook(lambda *_: calls.append(1)), with_kwargs=True)
    model[1].register_forward_hook(Hook(lambda *_: calls.append(2)))
    return model, calls


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("copied", [copy.deepcopy, saved])
def test_a_copy_loses_its_hooks_at_the_first_call(copied: object) -> None:
    assert callable(copied)
    model, calls = hooked()
    other = copied(model)
    other(torch.ones(1, 2))
    assert calls == []
    for module in other.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._forward_pre_hooks_with_kwargs
    model(torch.ones(1, 2))
    assert calls == [1, 2]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_script_is_refused_with_what_to_do() -> None:
    with pytest.raises(AttributeError, match=r"between optimizer.step\(\) and monitor.step\(\)"):
        torch.jit.script(hooked()[0])


def test_a_pass_may_train_where_gradients_are_asked_for() -> None:
    assert can_train()
    with torch.no_grad():
        assert not can_train()
    with aside():
        assert not can_train()
    assert can_train()
