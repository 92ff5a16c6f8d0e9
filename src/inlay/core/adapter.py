"""The tensors of one adapter at one site."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .method import Method
from .param import Param, generator_for
from .session import Session
from .site import Site


class Adapter(nn.Module):
    """The tensors of one adapter at one site, named as in HF's files.

    Attributes:
        method: the configuration as it holds for this site.
        path: the name of the adapted weight in the model.
        strength: 0 is the base, 1 the adapter, 2 doubles what it does.
        bank_at: the module and the weight at which what the layers share is registered; None where that is here.
        name, session: the adapter's name and its model's session, once it has been set in.
        trained_bias: a retrained copy of the host's bias, or None.
        first_row: of the layer's rows, where this is a part of an adapter (see `core.part`).
    """

    trained_bias: nn.Parameter | None
    session: Session | None = None
    first_row = 0
    _strength = 1.0
    _whole: Site | None = None

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __init__(
        self,
        method: Method,
        site: Site,
        path: str,
        *,
        dtype: torch.dtype,
        device: torch.device,
        shared: nn.Module | None = None,
        bank_at: tuple[str, str] | None = None,
        train_bias: bool = False,
    ) -> None:
        super().__init__()
        self.bank_at, self.name, self.session = bank_at, "", None
        self.method, self.site, self.path, self.strength = method, site, path, method.strength
        for name, param in self.declared.items():
            tensor = _initial(param, site, generator_for(method.seed, path, name), dtype, device)
            if param.trainable:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor, persistent=param.persistent)
        # A tuple hides the common part from registration everywhere but on the first layer.
        self._shared = (shared,)
        if shared is not None and bank_at is None:
            self.bank = shared
        bias = site.bias() if train_bias else None
        self.trained_bias = None if bias is None else nn.Parameter(bias.detach().to(device, dtype, copy=True))

    def materialise(self) -> None:
        """Give initial values to tensors that are still on the meta device."""
        method, site, incomplete, underived = self.method, self.site, False, False
        for table in (self._parameters, self._buffers):
            for name, tensor in table.items():
                if tensor is None or tensor.device.type != "meta":
                    continue
                incomplete |= table is self._parameters
                underived |= name in self._non_persistent_buffers_set or (name in self.declared and self.declared[name].optional)
                if name == "trained_bias":
                    value = site.bias().detach().to(tensor.dtype, copy=True)  # type: ignore[union-attr]
                else:
                    value = _initial(self.declared[name], site, generator_for(method.seed, self.path, name), tensor.dtype, site.device)
                if table is self._parameters:
                    value = nn.Parameter(value, requires_grad=tensor.requires_grad)
                table[name] = value  # type: ignore[assignment]
        if underived:
            method.derive(self)
        if incomplete:
            method.start(self)

    @property
    def declared(self) -> dict[str, Param]:
        """What the method keeps here, by name."""
        found = self.__dict__.get("_declared")
        if found is None:
            found = self.__dict__["_declared"] = self.method.params(self.site)
        return found

    def __getstate__(self) -> dict[str, Any]:
        # Declarations hold functions, which do not travel; they are made again from the method.
        return {k: v for k, v in self.__dict__.items() if k != "_declared"}

    # ---- what a session is told of, beside what autograd counts ----------------------------------------------------------
    def changes(self) -> None:
        """Have those who keep something of the adapter make it again."""
        if self.session is not None:
            self.session.revision += 1

    @property
    def strength(self) -> float:
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = value
        self.changes()

    def train(self, mode: bool = True) -> Adapter:
        if mode != self.training:
            self.changes()
        return super().train(mode)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        self.changes()
        super().register_parameter(name, param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        def keeping_digits(t: Tensor) -> Tensor:
            # A base that is stored in 8 bits (diffusers does so between two steps) takes its layers' children with it.
            to = fn(t.new_empty(0))
            if t.is_floating_point() and to.is_floating_point() and to.dtype.itemsize == 1 < t.dtype.itemsize:
                return t.to(to.device)
            return fn(t)

        self.changes()
        return super()._apply(keeping_digits, recurse)  # type: ignore[return-value]

    @property
    def whole(self) -> Site:
        """The site with all rows, also where this is a part of an adapter."""
        return self._whole or self.site

    @property
    def all_rows(self) -> bool:
        """Whether it has all rows of its matrices, also where it is a part."""
        return self._whole is None or self._whole.shape[-2] == self.site.shape[-2]

    @property
    def shared(self) -> Any:
        return self._shared[0]

    @property
    def call(self) -> dict[str, Tensor]:
        """What `Method.given` found in the running call of the model; empty where the layer is called by itself."""
        return {} if self.session is None else self.session.call.get(self.name, {})

    def extra_repr(self) -> str:
        return type(self.method).__name__


def _initial(param: Param, site: Site, generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Tensor:
    if param.dtype is not None:
        dtype = param.dtype
    if device.type == "meta":
        return torch.empty(param.shape(site), dtype=dtype, device=device)
    start = torch.empty(param.shape(site), dtype=param.dtype or torch.float32)
    param.init(start, generator)
    return start.to(device, dtype)
