"""Small tools around adapted models, by HF peft's names (``peft.helpers``)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import update_wrapper
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .core.additive import LowRank
from .core.config import PeftConfig
from .core.inlaid import adapters_of, places, session_of
from .core.method import full
from .core.place import Place
from .core.site import Embedding, TransposedLinear, site_of
from .core.targets import bare_model
from .signature import twin
from .tuner import BaseTuner


def _base(model: nn.Module) -> nn.Module:
    return model.model if isinstance(model, BaseTuner) else bare_model(model)


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether a folder or a hub repository holds an adapter."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except ValueError:
        return False
    return True


# ---- blocks ---------------------------------------------------------------------------------------------------------------
@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Nothing to do: an adapter's input meets its tensors in their own dtype, and the base's input is not touched."""
    yield


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiply the strength of the active adapters until the block ends.

    Raises:
        TypeError: the multiplier is no number.
        ValueError: the model has no adapters.
    """
    if isinstance(multiplier, bool) or not isinstance(multiplier, (int, float)):
        raise TypeError(f"multiplier should be a number, not {multiplier!r}.")
    session = session_of(_base(model))
    if session is None:
        raise ValueError("The model has no adapters.")
    found = [p.adapters[n] for p in places(_base(model)) if isinstance(p, Place) for n in p.here(session.active)]
    before = [adapter.strength for adapter in found]
    try:
        for adapter in found:
            adapter.strength *= multiplier
        yield
    finally:
        for adapter, strength in zip(found, before, strict=True):
            adapter.strength = strength


class DoraCaching:
    """DoRA in evaluation keeps the norms of its rows, in a ``with`` block or from ``DoraCaching()(enabled=True)`` on.

    They are computed anew after a step of training, a load, or any other write that autograd knows of.

    Args:
        enabled: inside the block.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._before: list[bool] = []

    def __enter__(self) -> None:
        from .methods.dora import cache

        self._before.append(cache.on)
        self(self.enabled)

    def __exit__(self, *_: object) -> None:
        self(self._before.pop())

    def __call__(self, enabled: bool = True) -> None:
        from .methods.dora import cache

        cache.on = enabled
        if not enabled:
            cache.norms.clear()


# ---- signatures -----------------------------------------------------------------------------------------------------------
def update_forward_signature(model: Any) -> None:
    """Let ``model.forward`` show the arguments and the documentation of the base's."""
    if _tells_nothing(model.forward) or hasattr(model.forward, "__signature__"):
        # What `show_signature` gave shows the arguments; this adds the base's documentation.
        model.forward = _shown_as(model, model.forward, type(model.get_base_model()).forward)


def update_generate_signature(model: Any) -> None:
    """Let ``model.generate`` show the arguments and the documentation of the base's."""
    if hasattr(model, "generate") and _tells_nothing(model.generate):
        model.generate = _shown_as(model, model.generate, type(model.get_base_model()).generate)


def update_signature(model: Any, method: str = "all") -> None:
    """Both, or one of them.

    Args:
        method: ``"forward"``, ``"generate"`` or ``"all"``.

    Raises:
        ValueError: it is none of these.
    """
    updates: dict[str, tuple[Callable[[Any], None], ...]] = {
        "forward": (update_forward_signature,),
        "generate": (update_generate_signature,),
        "all": (update_forward_signature, update_generate_signature),
    }
    if method not in updates:
        raise ValueError(f"method={method!r} is not one of {', '.join(updates)}.")
    for update in updates[method]:
        update(model)


def _tells_nothing(method: Callable[..., Any]) -> bool:
    return set(inspect.signature(method).parameters) <= {"args", "kwargs", "adapter_names"}


def _shown_as(model: Any, bound: MethodType, shown: Callable[..., Any]) -> MethodType:
    own = bound.__func__
    assert isinstance(own, FunctionType)
    return MethodType(update_wrapper(twin(own), shown, assigned=("__doc__", "__name__", "__annotations__")), model)


# ---- which modules to adapt -----------------------------------------------------------------------------------------------
class KappaTuneSelector:
    """Ranks weights by their condition number, the ratio of largest to smallest singular value: the best conditioned ones hold
    the least of what was learned, and are adapted first (arXiv 2506.16289).

    Args:
        model: the base.
        max_dim_size_to_analyze: larger matrices are left out.
        moe_param_suffixes: how the names of stacks of experts end.
        show_progress: draw a progress bar, where tqdm is installed.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model, self.max_dim_size_to_analyze, self.show_progress = model, max_dim_size_to_analyze, show_progress
        self.moe_param_suffixes = moe_param_suffixes or (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")
        self._of_modules: dict[str, float] | None = None
        self._of_parameters: dict[str, float] = {}

    def _look(self) -> None:
        if self._of_modules is not None:
            return
        layers = {n: s for n, m in self.model.named_modules() if (s := site_of(m)) is not None and _is_linear(m, s)}
        stacks = {n: q for n, q in self.model.named_parameters() if q.ndim == 3 and n.endswith(tuple(self.moe_param_suffixes))}
        self._of_modules = self._measured(layers, lambda site: site.read()[0])
        self._of_parameters = self._measured(stacks, lambda stack: stack)

    def _measured(self, weights: dict[str, Any], read: Callable[[Any], Tensor]) -> dict[str, float]:
        small = {n: w for n, w in weights.items() if max(w.shape[-2:]) <= self.max_dim_size_to_analyze}
        names: Any = small
        if self.show_progress and small:
            try:
                from tqdm.auto import tqdm

                names = tqdm(small, desc="Condition numbers", unit="weight")
            except ImportError:
                pass
        return {n: condition_number(read(small[n])) for n in names}

    def get_best_targets(self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None) -> list[str]:
        """Linear layers, the best conditioned first.

        Args:
            top_p: this share of them, at least one.
            num_modules: this many, before any share.
            threshold: those with a condition number up to this, where neither of the others is given.
        """
        self._look()
        return _best(self._of_modules or {}, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Stacks of experts, likewise; the number of a stack is the mean over its experts."""
        self._look()
        return _best(self._of_parameters, top_p, num_modules, threshold)


def _is_linear(module: nn.Module, site: Any) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(site, TransposedLinear) and not isinstance(site, Embedding))


@torch.no_grad()
def condition_number(w: Tensor) -> float:
    """The largest singular value by the smallest one; of several matrices, the mean."""
    s = torch.linalg.svdvals(full(w.detach()))
    return (s[..., 0] / (s[..., -1] + 1e-8)).mean().item()


def _best(found: dict[str, float], top_p: float | None, count: int | None, threshold: float | None) -> list[str]:
    names = sorted(found, key=found.__getitem__)
    if count is not None:
        return names[:count]
    if top_p is not None:
        return names[: max(1, int(len(names) * top_p))]
    return names if threshold is None else [n for n in names if found[n] <= threshold]


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """What `KappaTuneSelector` would adapt: ``target_modules`` and ``target_parameters`` (None without experts) of a configuration."""
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    return {
        "target_modules": selector.get_best_targets(top_p=top_p),
        "target_parameters": selector.get_best_target_parameters(top_p=top_p) or None,
    }


# ---- after training -------------------------------------------------------------------------------------------------------
@torch.no_grad()
def reduce_intruder_dimension(
    peft_model: Any,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], Any] | None = print,
) -> None:
    """Win back what fine-tuning made a model forget (Shuttleworth et al. 2024, arXiv 2410.21228).

    An intruder is a large singular direction of the adapted weight that is like none of the base's. A new adapter, which becomes
    the active one, has a part of them taken away.

    Args:
        peft_model: with a LoRA adapter.
        old_adapter_name: the adapter; it stays as it is.
        new_adapter_name: the new one.
        top_k: how many of the largest directions are looked at.
        threshold_epsilon: a direction whose largest cosine with one of the base is below this is an intruder.
        mitigation_lambda: what is left of an intruder is this share of it.
        logging_sink: is told of each layer; None tells nobody.

    Raises:
        ValueError: the adapter is none of LoRA, or has magnitudes of its own.
    """
    say = logging_sink or (lambda _: None)
    config = peft_model.peft_config[old_adapter_name]
    if config.peft_type != "LORA" or config.use_dora:
        raise ValueError(f"Intruders are taken out of the product of plain LoRA's factors, and {old_adapter_name!r} is something else.")
    peft_model.add_adapter(new_adapter_name, config)
    base = peft_model.get_base_model()
    for old, new in zip(adapters_of(base, old_adapter_name), adapters_of(base, new_adapter_name), strict=True):
        new.load_state_dict(old.state_dict())
        method = old.method
        if not isinstance(method, LowRank):
            continue
        a, b = method.factors(new)
        w = full(old.site.read()[0])
        delta = method.scaling * (full(b) @ full(a))
        found = _without_intruders(w, delta, top_k, threshold_epsilon, mitigation_lambda)
        say(f"{old.path}: " + (f"Intruders: {found[1]}" if found[1] else "No intruders"))
        if found[1]:
            u, s, v = torch.linalg.svd(found[0] / method.scaling, full_matrices=False)
            r = a.shape[-2]
            b.copy_(u[..., :r] * s[..., None, :r].sqrt())
            a.copy_(s[..., :r, None].sqrt() * v[..., :r, :])
    say(f"Enabling new adapter {new_adapter_name}")
    peft_model.set_adapter(new_adapter_name)


def _without_intruders(w: Tensor, delta: Tensor, top_k: int, epsilon: float, left: float) -> tuple[Tensor, int]:
    """The update ``(*batch, out, in)`` without what intrudes, and how many directions do."""
    known, _, _ = torch.linalg.svd(w, full_matrices=False)
    u, s, v = torch.linalg.svd(w + delta, full_matrices=False)
    nearest = (u.mT @ known).abs().amax(-1)
    intrudes = nearest < epsilon
    intrudes[..., top_k:] = False
    return delta - (1 - left) * ((u * (s * intrudes).unsqueeze(-2)) @ v), int(intrudes.sum())


__all__: Sequence[str] = [
    "DoraCaching",
    "KappaTuneSelector",
    "check_if_peft_model",
    "disable_input_dtype_casting",
    "find_kappa_target_modules",
    "reduce_intruder_dimension",
    "rescale_adapter_scale",
    "update_forward_signature",
    "update_generate_signature",
    "update_signature",
]
