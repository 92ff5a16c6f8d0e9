"""X-LoRA: trained adapters whose shares at each token follow from the base's last hidden state (Buehler 2024, arXiv 2402.07148).

The base runs twice. The first pass, without adapters, gives hidden states; a small classifier makes of them a share of each adapter
for each token (and layer); in the second pass the layers add what the adapters do in these shares. The adapters may be of any method.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.additive import add
from ..core.config import PeftConfig, PeftType
from ..core.method import Method, register
from ..core.param import Param, generator_for, kaiming_uniform, zeros
from ..core.site import Site

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner


def _help(text: str) -> dict[str, Any]:
    return {"help": text}


@register
@dataclass
class XLoraConfig(Method):
    """X-LoRA's options; HF peft's fields.

    Args:
        hidden_size: of the base; read from it where None.
        adapters: the adapters by name, as folders or repositories. One that the model has already is used as it is, and one that
            was saved beside the router is read from there.
        enable_softmax: shares sum to one.
        enable_softmax_topk: those of the best ``top_k_lora`` do.
        layerwise_scalings: shares of their own for each layer.
        xlora_depth, xlora_size, xlora_dropout_p: layers of the classifier, and their width and dropout, where there are several.
        use_trainable_adapters: train the adapters as well.
        softmax_temperature: lower is sharper.
        top_k_lora: at each token only so many adapters act.
        scaling_pass_value: for HF's signature; the first pass runs without adapters, there as here.
        global_scaling_weight: in front of all shares.

    Raises:
        ValueError: a number is out of its range.
    """

    peft_type: str | None = PeftType.XLORA
    hidden_size: int | None = field(default=None, metadata=_help("The base's hidden size; read from it where None."))
    adapters: dict[str, str] | None = field(default=None, metadata=_help("The adapters by name, as folders or repositories."))
    enable_softmax: bool = field(default=True, metadata=_help("Shares sum to one."))
    enable_softmax_topk: bool = field(default=False, metadata=_help("The shares of the best sum to one."))
    layerwise_scalings: bool = field(default=False, metadata=_help("Shares of their own for each layer."))
    xlora_depth: int = field(default=1, metadata=_help("Layers of the classifier."))
    xlora_size: int = field(default=2048, metadata=_help("Width of the classifier's layers."))
    xlora_dropout_p: float = field(default=0.2, metadata=_help("Dropout between the classifier's layers."))
    use_trainable_adapters: bool = field(default=False, metadata=_help("Train the adapters as well."))
    softmax_temperature: float = field(default=1.0, metadata=_help("Temperature of the softmax; lower is sharper."))
    top_k_lora: int | None = field(default=None, metadata=_help("How many adapters act at a token."))
    scaling_pass_value: float = field(default=0.0, metadata=_help("For HF's files."))
    global_scaling_weight: float = field(default=1.0, metadata=_help("In front of all shares."))

    prefix: ClassVar[str] = "internal_xlora_"
    paper: ClassVar[str] = "2402.07148"
    equation: ClassVar[str] = "W x + sum_k g_k(x) (E_k(x) - W x)"
    count_formula: ClassVar[str] = "hidden·adapters + adapters"
    ours: ClassVar[frozenset[str]] = frozenset(f.name for f in fields(Method)) - {f.name for f in fields(PeftConfig)}
    unmergeable: ClassVar[str] = "X-LoRA gives each token shares of its own, and a weight acts on all tokens."
    on_model: ClassVar[tuple[str, ...]] = (
        "get_latest_scalings", "get_scalings_log", "get_bucketed_scalings_log", "clear_scalings_log", "enable_scalings_logging",
        "disable_scalings_logging", "set_topk_lora", "set_global_scaling_weight", "get_global_scaling_weight", "set_scaling_pass_value",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("xlora_depth", "xlora_size", "softmax_temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` should be positive, not {getattr(self, name)!r}.")
        if self.top_k_lora is not None and self.top_k_lora < 1:
            raise ValueError(f"`top_k_lora` should be at least 1, or None for all, not {self.top_k_lora!r}.")
        if self.enable_softmax_topk and self.top_k_lora is None:
            warnings.warn("`enable_softmax_topk` chooses among the best `top_k_lora`, which is not set.", stacklevel=3)
        if self.enable_softmax_topk and self.enable_softmax:
            warnings.warn("`enable_softmax` and `enable_softmax_topk` normalise the shares twice; choose one.", stacklevel=3)

    def read_from(self, folder: Path) -> None:
        # What was saved beside the router is what it was trained with.
        saved = {name: folder / name for name in self.adapters or ()}
        here = {name: str(path) for name, path in saved.items() if (path / "adapter_config.json").is_file()}
        self.adapters = (self.adapters or {}) | here

    def to_file(self) -> dict[str, Any]:
        # Where the adapters are is for their own files to say.
        return {k: v for k, v in super().to_file().items() if k != "target_modules"}

    # -- which adapters, and where --
    def site_of(self, module: nn.Module) -> Site | None:
        return None

    def rebuild(self, base: nn.Module) -> Callable[[], None] | None:
        if not self.adapters:
            raise ValueError("X-LoRA routes to trained adapters: give them as `adapters`, a dictionary of names to folders.")
        if self.hidden_size is None:
            self.hidden_size = getattr(getattr(base, "config", None), "hidden_size", None)
            if self.hidden_size is None:
                raise ValueError(f"`hidden_size` is not given, and {type(base).__name__} has none in its config.")
        undo = Undo(base)
        try:
            for name, source in self.adapters.items():
                undo.load(name, source, self.use_trainable_adapters)
        except BaseException:
            undo()
            raise
        # The shares follow from all tokens of a row, so each pass needs all of them.
        undo.set_use_cache(False)
        gates = Gates(self)
        undo.hooks = [
            base.register_forward_pre_hook(gates.before, with_kwargs=True),
            base.register_forward_hook(gates.after, with_kwargs=True, always_call=True),
        ]
        return undo

    def prepare(self, base: nn.Module) -> None:
        from ..core.inlaid import places
        from ..core.place import Place
        from ..core.targets import Exactly

        names = self.adapters or {}
        self.target_modules = Exactly(p.path for p in places(base) if isinstance(p, Place) and any(n in p.adapters for n in names))  # type: ignore[assignment]

    def refuses(self, site: Site) -> str | None:
        from ..operations.route import takes_tokens

        return None if takes_tokens(site) else "its inputs are no tokens, and X-LoRA's shares are those of tokens"

    def params(self, site: Site) -> dict[str, Param]:
        return {"xlora_layer": Param((1,), zeros, trainable=False, persistent=False, batched=False, dtype=torch.int64)}

    def derive(self, p: Adapter) -> None:
        p.xlora_layer.fill_(p.shared.order[p.path])
        if self.use_trainable_adapters:
            # They are trained when this one is.
            p.experts = nn.ModuleList(self._experts(p).values())

    def shared(self, sites: Mapping[str, Site]) -> nn.Module | None:
        bank = Bank()
        bank.order = {path: i for i, path in enumerate(sites)}
        bank.internal_xlora_classifier = Classifier(self, len(sites))
        return bank

    def _experts(self, p: Adapter) -> dict[int, Adapter]:
        """The adapters that act at a layer, by number."""
        from ..operations.route import place_of

        here = place_of(p).adapters
        return {k: here[name] for k, name in enumerate(self.adapters or ()) if name in here}

    # -- the mathematics --
    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        from ..operations.route import routed

        y, experts = inner(x), self._experts(p)
        if "scalings" not in p.call or not experts:
            return y
        gates = self._chosen(p.call["scalings"].to(y.device).index_select(2, p.xlora_layer).squeeze(2))
        added = routed(inner, x, y, list(experts.values()), gates[..., list(experts)])
        return add(y, added, self.global_scaling_weight * p.strength)

    def _chosen(self, gates: Tensor) -> Tensor:
        """The shares ``(rows, tokens, adapters)`` with those of all but the best at zero."""
        if self.top_k_lora is not None:
            best = gates.topk(min(self.top_k_lora, gates.shape[-1]), -1).indices
            gates = torch.zeros_like(gates).scatter(-1, best, gates.gather(-1, best))
        if self.enable_softmax_topk:
            acting = gates != 0
            gates = torch.softmax(gates.masked_fill(~acting, float("-inf")), -1).masked_fill(~acting, 0.0)
        return gates

    # -- what users ask of the model --
    def get_latest_scalings(self, adapters: Sequence[Adapter]) -> Tensor | None:
        """The shares of the last call, ``(rows, tokens, layers, adapters)``, or None before the first."""
        return adapters[0].shared.latest

    def get_scalings_log(self, adapters: Sequence[Adapter]) -> list[Tensor]:
        """The shares of all calls since logging began."""
        return list(adapters[0].shared.log)

    def get_bucketed_scalings_log(self, adapters: Sequence[Adapter]) -> dict[int, tuple[list[int], list[Tensor]]]:
        """The log by numbers of tokens: positions in the log, and shares."""
        found: dict[int, tuple[list[int], list[Tensor]]] = {}
        for i, scalings in enumerate(adapters[0].shared.log):
            positions, tensors = found.setdefault(scalings.shape[1], ([], []))
            positions.append(i)
            tensors.append(scalings)
        return found

    def clear_scalings_log(self, adapters: Sequence[Adapter]) -> None:
        adapters[0].shared.log.clear()

    def enable_scalings_logging(self, adapters: Sequence[Adapter]) -> None:
        adapters[0].shared.logging = True

    def disable_scalings_logging(self, adapters: Sequence[Adapter]) -> None:
        """Stop logging; what is in the log stays."""
        adapters[0].shared.logging = False

    def set_topk_lora(self, adapters: Sequence[Adapter], value: int | None) -> None:
        self._set(adapters, "top_k_lora", value)

    def set_global_scaling_weight(self, adapters: Sequence[Adapter], weight: float) -> None:
        self._set(adapters, "global_scaling_weight", weight)

    def get_global_scaling_weight(self, adapters: Sequence[Adapter]) -> float:
        return self.global_scaling_weight

    def set_scaling_pass_value(self, adapters: Sequence[Adapter], value: float | None) -> None:
        self._set(adapters, "scaling_pass_value", 1 / len(self.adapters or (0,)) if value is None else value)

    def _set(self, adapters: Sequence[Adapter], name: str, value: Any) -> None:
        for method in (self, *(p.method for p in adapters)):
            setattr(method, name, value)


class Bank(nn.Module):
    """What the layers have in common.

    Attributes:
        order: the number of each layer.
        latest: the shares of the last call.
        log, logging: those of earlier calls, if they are kept.
    """

    order: dict[str, int]

    def __init__(self) -> None:
        super().__init__()
        self.latest: Tensor | None = None
        self.log: list[Tensor] = []
        self.logging = False

    def keep(self, scalings: Tensor) -> None:
        self.latest = scalings.detach()
        if self.logging:
            self.log.append(self.latest)


class Classifier(nn.Module):
    """Shares from hidden states."""

    def __init__(self, config: XLoraConfig, count: int) -> None:
        super().__init__()
        self.config, self.count, self.experts = config, count, len(config.adapters or ())
        widths = [config.hidden_size or 0] + [config.xlora_size] * (config.xlora_depth - 1)
        layers: list[nn.Module] = []
        for one, other in pairwise(widths):
            layers += [nn.Linear(one, other), nn.ReLU()]
            if config.xlora_dropout_p > 0:
                layers.append(nn.Dropout(config.xlora_dropout_p))
        layers.append(nn.Linear(widths[-1], self.experts * (count if config.layerwise_scalings else 1)))
        self.layers = nn.Sequential(*layers)
        for i, layer in enumerate(self.layers):
            if isinstance(layer, nn.Linear):
                drawn = torch.empty(layer.out_features, layer.in_features + 1)
                kaiming_uniform(drawn, generator_for(config.seed, "xlora", str(i)))
                layer.weight.data, layer.bias.data = drawn[:, 1:].clone(), drawn[:, 0].clone()

    def forward(self, hidden: Tensor) -> Tensor:
        """``(rows, tokens, hidden)`` to ``(rows, tokens, layers, adapters)``."""
        logits = self.layers(hidden.to(next(self.parameters()).dtype)).unflatten(-1, (-1, self.experts))
        logits = logits.expand(*logits.shape[:2], self.count, self.experts)
        return torch.softmax(logits / self.config.softmax_temperature, -1) if self.config.enable_softmax else logits


# ---- around the model's call ----------------------------------------------------------------------------------------------
_entered: ContextVar[tuple[Any, ...]] = ContextVar("inlay_xlora_calls", default=())


@dataclass
class Gates:
    """Hooks of the model: the first pass before each call, whose shares the layers find in the running call."""

    config: XLoraConfig

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        from ..core.inlaid import adapters_of, session_of
        from ..core.session import carry_choices

        session = session_of(model)
        acting = () if session is None else session.choice().all
        name = next((n for n in acting if session is not None and session.configs[n] is self.config), None)
        if session is None or name is None:
            _entered.set((*_entered.get(), None))
            return None
        if kwargs.get("past_key_values") is not None:
            raise ValueError("X-LoRA needs all tokens of a row in each call; call the model with `use_cache=False` and no cache.")
        bank = adapters_of(model, name)[0].shared
        asked = {k: v for k, v in kwargs.items() if k != "labels"} | {"output_hidden_states": True, "return_dict": True}
        with torch.no_grad(), session.local(()):
            hidden = model(*args, **asked).hidden_states[-1]
        scalings = bank.internal_xlora_classifier(hidden)
        bank.keep(scalings)
        if getattr(model, "is_gradient_checkpointing", False):
            carry_choices(model, session)
        context = session.calling({**session.call, name: {"scalings": scalings}})
        context.__enter__()
        _entered.set((*_entered.get(), context))
        return None

    def after(self, *_: Any) -> None:
        *rest, context = _entered.get()
        _entered.set(tuple(rest))
        if context is not None:
            context.__exit__(None, None, None)


class Undo:
    """Loads what X-LoRA needs into a model, and takes it out again."""

    def __init__(self, base: nn.Module) -> None:
        self.base, self.names, self.hooks = base, [], []
        self.caches: list[tuple[Any, bool]] = []

    def load(self, name: str, source: str, trainable: bool) -> None:
        from ..core.attach import attach
        from ..core.inlaid import session_of
        from ..model import filling_options
        from ..state_dict import load_peft_weights

        session = session_of(self.base)
        if session is not None and name in session.configs:
            return
        config = PeftConfig.from_pretrained(source)
        config.inference_mode = not trainable
        tensors = load_peft_weights(str(source), device="cpu")
        attach(self.base, config, name, activate_it=False, **filling_options(self.base, tensors, name, True, config.is_prompt_learning))
        self.names.append(name)

    def set_use_cache(self, value: bool) -> None:
        for config in (getattr(self.base, "config", None), getattr(self.base, "generation_config", None)):
            if hasattr(config, "use_cache"):
                self.caches.append((config, config.use_cache))  # type: ignore[union-attr]
                config.use_cache = value  # type: ignore[union-attr]

    def __call__(self) -> None:
        from ..core.attach import detach
        from ..core.inlaid import session_of

        for hook in self.hooks:
            hook.remove()
        for config, value in self.caches:
            config.use_cache = value
        for name in self.names:
            session = session_of(self.base)
            if session is not None and name in session.configs:
                detach(self.base, name)
