"""One walk through the blocks, with the shadow beside it."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..kernels.mixed import selector

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.session import Session
    from ..methods.shadow import ShadowConfig
    from .network import Shadow


def of_block(y: Any, x: Tensor) -> Tensor:
    """The hidden states in what a block returned: tensors, of which the one like its input is meant."""
    if isinstance(y, Tensor):
        return y
    if not isinstance(y, tuple):
        y = tuple(getattr(y, name) for name in ("hidden_states", "last_hidden_state") if getattr(y, name, None) is not None)
    return next((t for t in y if isinstance(t, Tensor) and t.shape == x.shape), y[0])


@dataclass
class Seen:
    """What the model's call knew, for the loss: it stands in for a tensor with the batch in front.

    Attributes:
        start: the shadow's first state, once there is one.
    """

    labels: Tensor | None
    mask: Tensor | None
    start: Tensor | None = None

    def __getitem__(self, rows: list[int]) -> Seen:
        return self


@dataclass
class Walked:
    """The states of the shadow before each block, of all rows of a batch.

    Blocks that are computed again in the backward pass find the state that they found before.

    Attributes:
        states: by the name of the block.
        rows: which rows of the batch the blocks are on; all where None.
        count: of the rows for which adapters were named; a row may have several entries.
        call: what the first block was called with, by name.
    """

    states: dict[str, Tensor] = field(default_factory=dict)
    rows: tuple[int, ...] | None = None
    count: int = 0
    call: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, rows: list[int]) -> Walked:
        own = range(self.count) if self.rows is None else self.rows
        return Walked(self.states, tuple(own[i] for i in rows), self.count, self.call)

    def state(self, p: Adapter, x: Tensor) -> Tensor:
        """The state before a block on ``x``."""
        found = self.states.get(p.path)
        if found is None:
            return p.shared.first_state_of(x, self.call if self.rows is None else tree_map(lambda v: self._of_rows(v, x), self.call))
        return (found if self.rows is None else found[self._mine(x)]).to(x.device)

    def go_on(self, p: Adapter, state: Tensor) -> None:
        """Keep the state behind a block for the next one."""
        following = p.shared.after[p.path]
        if self.rows is not None:
            whole = self.states.get(following, self.states.get(p.path))
            if whole is None:
                whole = state.new_zeros(self.count * (len(state) // len(self.rows)), *state.shape[1:])
            mine = self._mine(state)
            index = torch.arange(len(whole), device=state.device)[mine]
            state = whole.to(state).index_copy(0, index, state)
        self.states[following] = state

    def _of_rows(self, value: Any, x: Tensor) -> Any:
        """Of what has the batch in front, that of the rows in ``x``."""
        assert self.rows is not None
        whole = self.count * (len(x) // len(self.rows))
        return value[self._mine(x)] if isinstance(value, Tensor) and value.ndim and len(value) == whole else value

    def _mine(self, x: Tensor) -> Any:
        assert self.rows is not None
        return selector(self.rows, len(x) // len(self.rows), x.device)


_entered: ContextVar[tuple[Any, ...]] = ContextVar("inlay_shadow_walks", default=())


@dataclass
class Walk:
    """Hooks of the module that holds the blocks: the shadow looks at the input first.

    Attributes:
        config: of the adapter.
        names: of the module's arguments.
        inside: of those of the first block.
    """

    config: ShadowConfig
    names: list[str]
    inside: list[str]

    def entering(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        from ..core.inlaid import session_of

        session = session_of(block)
        name = None if session is None else self._name(session)
        walked = None if session is None or name is None else session.call.get(name, {}).get("shadow")
        if isinstance(walked, Walked):
            walked.call = dict(zip(self.inside, args, strict=False)) | kwargs

    def before(self, holder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entry = None
        try:
            entry = self._entry(holder, args, kwargs)
        finally:
            # `after` is called whatever happens.
            _entered.set((*_entered.get(), entry))

    def _entry(self, holder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """What the end of the walk has to know; None where this adapter does not act."""
        from ..core.inlaid import session_of
        from ..core.session import carry_choices

        session = session_of(holder)
        name = None if session is None else self._name(session)
        if session is None or name is None:
            return None
        bank, call = _bank(holder, name), dict(zip(self.names, args, strict=False)) | kwargs
        rows = session.choice().rows
        walked, shadows = Walked(count=0 if rows is None else len(rows)), None
        if call.get("input_ids") is not None or call.get("inputs_embeds") is not None:
            shadows = _cache(call, name, bank, holder)
            walked.states[bank.start] = bank.first_state(call, shadows)
        given = session.call.get(name, {})
        if isinstance(given.get("shadow"), Seen):
            given["shadow"].start = walked.states.get(bank.start)  # type: ignore[attr-defined]
        if torch.is_grad_enabled() and getattr(holder, "is_gradient_checkpointing", False):
            carry_choices(holder, session)
        context = session.calling({**session.call, name: {**given, "shadow": walked}})  # type: ignore[dict-item]
        context.__enter__()
        return context, name, shadows, call.get("past_key_values")

    def after(self, holder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        *rest, entered = _entered.get()
        _entered.set(tuple(rest))
        if entered is None:
            return
        context, name, shadows, cache = entered
        context.__exit__(None, None, None)
        cache = getattr(output, "past_key_values", None) if cache is None else cache
        if shadows is not None and cache is not None and name not in vars(cache).setdefault("_inlay_shadows", {}):
            vars(cache)["_inlay_shadows"][name] = len(cache.layers), len(cache.layers) + len(shadows.layers)
            cache.layers.extend(shadows.layers)

    def _name(self, session: Session) -> str | None:
        """The adapter's, if it acts here and now."""
        return next((n for n in session.choice().all if session.configs[n] is self.config), None)


def _bank(holder: nn.Module, name: str) -> Shadow:
    from ..core.adapter import Adapter
    from ..core.inlaid import places

    return next(p for place in places(holder) if isinstance(p := place.adapters.get(name), Adapter) and p.shared is not None).shared


def _cache(call: Mapping[str, Any], name: str, bank: Shadow, holder: nn.Module) -> Any:
    """The shadow's part of a cache, which lies behind the base's own layers; None where nothing is kept.

    Raises:
        ValueError: the cache has tokens that the shadow has not seen.
    """
    cache, wanted = call.get("past_key_values"), call.get("use_cache")
    if wanted is None:
        wanted = getattr(holder.config, "use_cache", False) and not holder.training
    if cache is None and not wanted:
        return None
    from transformers.cache_utils import Cache, DynamicCache, StaticCache

    if cache is None:
        return DynamicCache(config=bank.shadow_backbone.config)  # type: ignore[arg-type]
    found = vars(cache).get("_inlay_shadows", {}).get(name)
    if found is not None:
        return Cache(layers=cache.layers[slice(*found)])
    if cache.get_seq_length():
        raise ValueError(f"The cache holds tokens that the shadow of {name!r} has not seen; fill it with this adapter active.")
    lengths = [layer.max_cache_len for layer in cache.layers if hasattr(layer, "max_cache_len")]
    if lengths:
        return StaticCache(config=bank.shadow_backbone.config, max_cache_len=max(lengths))  # type: ignore[arg-type]
    return DynamicCache(config=bank.shadow_backbone.config)  # type: ignore[arg-type]


class Undo:
    """Takes the hooks out again."""

    def __init__(self, config: ShadowConfig) -> None:
        self.config, self.hooks = config, []

    def __call__(self) -> None:
        self.config.__dict__.pop("_around", None)
        for hook in self.hooks:
            hook.remove()
