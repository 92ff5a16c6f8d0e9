"""Methods that act after a step of the optimiser (`Method.stepped`), with any optimiser of torch and without a word of the user."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from .inlaid import adapters_of
from .method import Method
from .session import Session

_watched: WeakKeyDictionary[Session, ref[nn.Module]] = WeakKeyDictionary()
_hooks: list[Any] = []


def _acts_on_steps(config: object) -> bool:
    return isinstance(config, Method) and type(config).stepped is not Method.stepped


def watch(session: Session, model: nn.Module) -> None:
    """Have the adapters of a model told of the steps of the optimisers that hold their parameters."""
    if not any(map(_acts_on_steps, session.configs.values())):
        return
    if not _hooks:
        _hooks.append(register_optimizer_step_post_hook(_stepped))
    _watched[session] = ref(model)


def _stepped(optimizer: Optimizer, *_: Any) -> None:
    held = {id(q) for group in optimizer.param_groups for q in group["params"]}
    for session, known in list(_watched.items()):
        model = known()
        if model is None:
            continue
        for name in session.active:
            config = session.configs[name]
            if isinstance(config, Method) and _acts_on_steps(config):
                adapters = [p for p in adapters_of(model, name) if any(id(q) in held for q in p.parameters())]
                if adapters:
                    config.stepped(adapters, optimizer)
