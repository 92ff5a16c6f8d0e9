"""The only record of who is active in one model.

What a ``with`` block or the rows of a batch choose is local to the thread or asyncio task that chose it, so two requests that
run on one model never see each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .config import PeftConfig, nearest

if TYPE_CHECKING:
    from .rest import Rest

BASE = "__base__"
# What acts on one row of a batch: an adapter, several in their order, or `BASE`.
Row = str | tuple[str, ...]


def names_of(row: Row) -> tuple[str, ...]:
    """The adapters of a row."""
    return () if row == BASE else (row,) if isinstance(row, str) else row


def rows_of(named: Sequence[str | Sequence[str]]) -> tuple[Row, ...]:
    """What was named for each row of a batch.

    Raises:
        ValueError: it is one name for all of them, or a row's is no name and no list of names.
    """
    if isinstance(named, str):
        raise ValueError(f"Adapters of rows are a list with a name for each row; {named!r} is one for all: use `use_adapters({named!r})`.")
    for row in named:
        if not isinstance(row, str) and not (isinstance(row, (list, tuple)) and all(isinstance(name, str) for name in row)):
            raise ValueError(f"A row of a batch has an adapter's name, a list of such, or {BASE!r}, not {row!r}.")
    return tuple(row if isinstance(row, str) else tuple(row) for row in named)


class Choice(NamedTuple):
    """Adapters for the whole batch, in the order in which they act; or for each row, perhaps in a time in which no adapter changes."""

    names: tuple[str, ...]
    rows: tuple[Row, ...] | None = None
    rest: Rest | None = None

    @property
    def all(self) -> tuple[str, ...]:
        """Every adapter that acts on some row."""
        return self.names if self.rows is None else tuple(dict.fromkeys(n for row in self.rows for n in names_of(row)))


# What the methods of a model took from the call of it that is running, by the adapters' names: see `Method.given`.
Call = dict[str, dict[str, Tensor]]

_local: ContextVar[tuple[tuple[Session, Choice], ...]] = ContextVar("inlay_choices")
_calls: ContextVar[tuple[tuple[Session, Call], ...]] = ContextVar("inlay_calls")


class _Here(tuple[()]):
    """What holds in this thread and task, for a compiled graph as well.

    torch.compile cannot trace a context variable. But a property that C code answers it takes for a value, and a graph is guarded by
    it: read again before each run, in the thread and the task that runs it. Where nothing is set ``get`` returns its argument, which
    is the empty tuple that this is.
    """

    __slots__ = ()
    choices = property(_local.get)
    calls = property(_calls.get)


_here = _Here()


@dataclass(eq=False)
class Session:
    """The adapters of one model.

    Attributes:
        configs: the configuration of each adapter by name; ``model.peft_config`` is this dictionary.
        active: the names chosen by `set_adapter`.
        enabled: whether they act.
        trainable: the adapters that are trained while they are active.
        frozen: base parameters that had been trainable; the last detaching sets them free again.
        traced: while a graph is traced, the innermost choice that was made within it; torch.compile cannot set a context variable.
        traced_call: likewise what the innermost call of the model within it gave to its adapters.
        listening: the adapters that take something from the model's call.
        adds_to_loss: the model's calls add the methods' terms to its loss; a trainer that adds them itself takes that over.
        in_loss: the adapters whose terms the last call of the model has added to its loss.
        revision: counts the changes of seats, strengths, modes and tensors' places; what is written into tensors autograd counts.
        undo: what takes back the changes that an adapter made to the structure of the base, by name.
    """

    configs: dict[str, PeftConfig] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    enabled: bool = True
    trainable: set[str] = field(default_factory=set)
    frozen: list[nn.Parameter] = field(default_factory=list)
    traced: Choice | None = None
    traced_call: Call | None = None
    in_loss: tuple[str, ...] = ()
    listening: set[str] = field(default_factory=set)
    adds_to_loss: bool = True
    revision: int = 0
    undo: dict[str, Callable[[], None]] = field(default_factory=dict)

    def choice(self) -> Choice:
        """Who acts here and now."""
        if self.traced is not None and torch.compiler.is_dynamo_compiling():
            return self.traced
        for session, choice in reversed(_here.choices):
            if session is self:
                return choice
        return Choice(self.active if self.enabled else ())

    @property
    def shown(self) -> str | list[str]:
        """The active adapter's name, or the list of them, as HF's ``active_adapter`` is."""
        return self.active[0] if len(self.active) == 1 else list(self.active)

    def check(self, names: Iterable[str]) -> tuple[str, ...]:
        """The names as a tuple.

        Raises:
            ValueError: one of them is no adapter of this model.
        """
        names = tuple(names)
        for name in names:
            if name not in self.configs:
                raise ValueError(f"Adapter {name!r} not found.{nearest(name, self.configs)} Loaded: {', '.join(self.configs) or 'none'}.")
        return names

    def forget(self, name: str) -> None:
        """Let an adapter be neither active nor trained any more. As in HF peft, where none is left active the first other one is."""
        remaining = tuple(n for n in self.active if n != name)
        if not remaining and name in self.active:
            remaining = tuple(n for n in self.configs if n != name)[:1]
        self.active = remaining
        self.trainable.discard(name)
        self.listening.discard(name)

    @property
    def chosen_here(self) -> bool:
        """Whether a block of this thread or task has chosen."""
        return not torch.compiler.is_dynamo_compiling() and any(session is self for session, _ in _here.choices)

    @contextmanager
    def local(
        self, names: Sequence[str] = (), rows: Sequence[str | Sequence[str]] | None = None, rest: Rest | None = None
    ) -> Iterator[None]:
        """Choose for this thread or task until the block ends; blocks nest.

        Args:
            names: adapters for the whole batch.
            rows: in their place, for each row an adapter, several, or ``"__base__"``.
            rest: the time in which none of these changes, if it is one.
        """
        choice = Choice(self.check(names), None if rows is None else rows_of(rows), rest)
        self.check(choice.all)
        with self.under(choice):
            yield

    @contextmanager
    def under(self, choice: Choice) -> Iterator[None]:
        """A choice that was made before holds in this thread or task until the block ends."""
        if torch.compiler.is_dynamo_compiling():
            before, self.traced = self.traced, choice
            try:
                yield
            finally:
                self.traced = before
            return
        token = _local.set((*_here.choices, (self, choice)))
        try:
            yield
        finally:
            _local.reset(token)

    # ---- what the running call gave -----------------------------------------------------------------------------------
    @property
    def call(self) -> Call:
        """What the adapters took from the call of the model that is running in this thread or task."""
        if torch.compiler.is_dynamo_compiling() and self.traced_call is not None:
            return self.traced_call
        for session, call in reversed(_here.calls):
            if session is self:
                return call
        return {}

    @contextmanager
    def calling(self, call: Call) -> Iterator[None]:
        """The layers are told this of the model's call until the block ends."""
        if torch.compiler.is_dynamo_compiling():
            before, self.traced_call = self.traced_call, call
            try:
                yield
            finally:
                self.traced_call = before
            return
        token = _calls.set((*_here.calls, (self, call)))
        try:
            yield
        finally:
            _calls.reset(token)

    def narrowed(self, rows: Sequence[int]) -> AbstractContextManager[None]:
        """The layers are told of these rows of the batch alone."""
        if not self.call:
            return nullcontext()
        return self.calling({name: {key: t[list(rows)] for key, t in given.items()} for name, given in self.call.items()})


@dataclass
class CarriedChoice:
    """A checkpointing function under which a block is computed again with the adapters of its first run.

    That happens in the backward pass, when the ``with`` block or the call that chose them is long over.

    Attributes:
        session: of the model.
        checkpoint: the function that this one stands for, as transformers keeps it in ``_gradient_checkpointing_func``.
    """

    session: Session
    checkpoint: Callable[..., Any]

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        choice, call = self.session.choice(), self.session.call

        def run(*inputs: Any, **named: Any) -> Any:
            with self.session.under(choice), self.session.calling(call):
                return function(*inputs, **named)

        return self.checkpoint(function if torch.compiler.is_dynamo_compiling() else run, *args, **kwargs)


def carry_choices(model: nn.Module, session: Session) -> None:
    """Have the checkpointed blocks of a model computed again as they were computed first."""
    for module in model.modules():
        checkpoint = vars(module).get("_gradient_checkpointing_func")
        if checkpoint is not None and not isinstance(checkpoint, CarriedChoice):
            vars(module)["_gradient_checkpointing_func"] = CarriedChoice(session, checkpoint)


def drop_choices(model: nn.Module) -> None:
    """Undo `carry_choices`."""
    for module in model.modules():
        checkpoint = vars(module).get("_gradient_checkpointing_func")
        if isinstance(checkpoint, CarriedChoice):
            vars(module)["_gradient_checkpointing_func"] = checkpoint.checkpoint
