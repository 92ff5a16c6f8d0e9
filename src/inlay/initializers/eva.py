"""EVA: A starts from the principal directions of a layer's inputs, and ranks go where they explain most (arXiv 2410.07170).

The directions are found while the data streams by, until they stay. B starts from zero, so the adapter starts from the base. What a
convolution multiplies are patches of its input, in each group apart; ranks stay as they are where groups share them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.families import acts_on_last_axis
from .calibration import Progress, is_multiplied, multiplied, targets
from .directions import StreamedDirections
from .search import Search
from .started import Started, no_factors

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.place import Place
    from ..core.site import Site

PREFIX = "base_model.model."


@dataclass
class EvaConfig:
    """Options of EVA.

    Args:
        rho: a layer may get up to ``rho`` times its rank; 1 leaves the ranks as they are.
        tau: a direction counts as found when the cosine between two steps is at least this.
        use_label_mask: leave out positions whose label is ``label_mask_value``.
        label_mask_value: see there.
        whiten: divide the directions by the roots of their singular values.
        adjust_scaling_factors: change a layer's alpha with its rank, so that their ratio stays.

    Raises:
        ValueError: ``rho`` is below 1, or ``tau`` not in [0, 1].
    """

    rho: float = field(default=2.0, metadata={"help": "A layer may get up to rho times its rank."})
    tau: float = field(default=0.99, metadata={"help": "Cosine from which on a direction counts as found."})
    use_label_mask: bool = field(default=True, metadata={"help": "Leave out positions whose label is masked."})
    label_mask_value: int = field(default=-100, metadata={"help": "The label that masks."})
    whiten: bool = field(default=False, metadata={"help": "Divide directions by the roots of their singular values."})
    adjust_scaling_factors: bool = field(default=True, metadata={"help": "Keep alpha / rank when a rank changes."})

    def __post_init__(self) -> None:
        if self.rho < 1:
            raise ValueError(f"`rho` must be at least 1, not {self.rho!r}.")
        if not 0 <= self.tau <= 1:
            raise ValueError(f"`tau` must be in [0, 1], not {self.tau!r}.")


# ---- what is looked at --------------------------------------------------------------------------------------------------
def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: Any) -> Tensor:
    """The positions ``(n, 2)`` that count: those of the attention mask, and of labels that are not masked."""
    if not isinstance(model_input, Mapping):
        raise TypeError("The batches must be dictionaries with `input_ids`; for others pass a `prepare_model_inputs_fn` of your own.")
    mask = model_input.get("attention_mask")
    mask = torch.ones_like(model_input["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
    options = peft_config.eva_config or EvaConfig()
    if options.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != options.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """The rows ``(n, in)`` of a layer's input at those positions."""
    return _tensor(layer_input, layer_name)[tuple(model_input.unbind(1))]


def _all_rows(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    return _tensor(layer_input, layer_name).flatten(0, -2)


def _patches(site: Site, layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    return multiplied(site, _tensor(layer_input, layer_name))


def _tensor(layer_input: Any, name: str) -> Tensor:
    first = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    if not isinstance(first, Tensor):
        raise TypeError(f"The input of {name!r} is a {type(first).__name__}; pass a `prepare_layer_inputs_fn` that makes rows of it.")
    return first


# ---- the public functions -----------------------------------------------------------------------------------------------
@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: Any = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Callable[..., Tensor] | Mapping[str, Callable[..., Tensor]] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
    *,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """The directions that each layer is to start from, as many as it is to have ranks.

    Args:
        model: a `PeftModel`, whose adapter is looked through, or a base.
        dataloader: batches; gone through as often as it takes.
        peft_config: for a base.
        forward_fn: runs the model on a batch.
        prepare_model_inputs_fn: what the layers' functions need to know of a batch; the positions that count.
        prepare_layer_inputs_fn: rows of a layer's arguments, given that and the layer's name; or such functions by layer.
        adapter_name: of the `PeftModel`.
        gather_distributed_inputs: take the rows of all processes.
        show_progress_bar: for HF's signature; pass ``progress``.
        progress: called with the number of layers whose directions are found, and of all.

    Returns:
        ``(*groups, rank, in)`` by module name; a rank may be 0.

    Raises:
        ValueError: the method has no free factors, no layer is meant whose inputs could be looked at, or there is no data, or not enough.
    """
    from ..core.inlaid import session_of
    from ..core.targets import bare_model

    base = bare_model(model)
    session = session_of(base)
    if peft_config is None:
        if session is None:
            raise ValueError("`peft_config` is needed for a model without adapters.")
        peft_config = session.configs[adapter_name]
    if why := no_factors(type(peft_config)):
        raise ValueError(f"{why}.")
    prefix = PREFIX if base is not model else ""
    if session is not None and adapter_name in session.configs:
        sites = {p.path: p.site for _, p in _adapted(base, adapter_name)}
    else:
        sites = targets(base, peft_config)
    sites = {name: site for name, site in sites.items() if is_multiplied(site)}
    if not sites:
        raise ValueError("EVA looks at the inputs of linear layers and convolutions, and none is among the targets.")
    options: EvaConfig = peft_config.eva_config or EvaConfig()
    methods: dict[str, Any] = {name: peft_config.at(name) for name in sites}
    ranks = {name: methods[name].rank_at(site) for name, site in sites.items()}
    movable = {name for name, site in sites.items() if methods[name].ranks_may_move and not site.batch}
    rank = getattr(peft_config, peft_config.size_option)
    rho = min(options.rho, max(max(site.shape[-2:]) for site in sites.values()) // rank) if options.rho > 1000 else options.rho
    most = {name: min(round(r * (rho if name in movable else 1)), sites[name].size("in")) for name, r in ranks.items()}
    functions = _functions(prepare_layer_inputs_fn, sites, prefix)

    def prepared(batch: Any) -> Any:
        return batch if prepare_model_inputs_fn is None else prepare_model_inputs_fn(batch, peft_config)

    dist = torch.distributed
    gather = gather_distributed_inputs and dist.is_available() and dist.is_initialized()
    search = Search(sites, functions, ranks, most, movable, options.tau, prepared, gather)
    training = model.training
    model.eval()
    try:
        with nullcontext() if session is None else session.local(()):
            found = search.run(lambda batch: forward_fn(model, batch), dataloader, progress)
    finally:
        model.train(training)
    return {prefix + name: _directions(stream, search.wanted[name], options.whiten) for name, stream in found.items()}


def _functions(given: Any, sites: dict[str, Site], prefix: str) -> dict[str, Callable[..., Tensor]]:
    """What makes rows of a layer's arguments, by its name. Layers that may share their directions have one function in common."""
    by_name = given if isinstance(given, Mapping) else {}
    unknown = [n for n in by_name if n not in sites and n.removeprefix(prefix) not in sites]
    if unknown:
        raise ValueError(f"prepare_layer_inputs_fn names layers that are not among the targets: {', '.join(unknown)}.")
    by_default = given in (None, prepare_layer_inputs_fn_language_modeling)
    found: dict[str, Callable[..., Tensor]] = {}
    for name, site in sites.items():
        own: Any = by_name.get(prefix + name, by_name.get(name))
        if own is None and not by_name and (acts_on_last_axis(site) or not by_default):
            own = given
        found[name] = own or (_all_rows if acts_on_last_axis(site) else partial(_patches, site))
    return found


def _directions(stream: StreamedDirections, count: int, whiten: bool) -> Tensor:
    assert stream.directions is not None
    assert stream.values is not None
    found = stream.directions[..., :count, :].clone()
    return found / stream.values[..., :count].sqrt().unsqueeze(-1) if whiten else found


@torch.no_grad()
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Callable[..., Tensor] | Mapping[str, Callable[..., Tensor]] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
    *,
    progress: Progress | None = None,
) -> None:
    """Give an adapter with ``init_lora_weights="eva"`` its ranks and its start. Do so before an optimiser holds its parameters.

    Args:
        model: the adapted model.
        dataloader: see `get_eva_state_dict`, as all other arguments.
        eva_state_dict: what that function returned, in place of data.

    Raises:
        ValueError: the adapter does not start by EVA, several are active, or there is neither data nor a state dict.
    """
    from ..core.inlaid import host_of, session_of, unseat
    from ..core.targets import bare_model

    base = bare_model(model)
    session = session_of(base)
    if session is None:
        raise ValueError("The model has no adapter; call `get_peft_model` first.")
    if len(session.active) > 1:
        raise ValueError("Activate a single adapter before it is started by EVA: ranks that change would change the others' inputs.")
    session.check((adapter_name,))
    config: Any = session.configs[adapter_name]
    if why := no_factors(type(config)):
        raise ValueError(f"{why}.")
    if config.init != "eva":
        raise ValueError(f"`initialize_lora_eva_weights` is for adapters with {config.init_option}='eva'.")
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("Give a `dataloader`, or an `eva_state_dict` that was computed before.")
        eva_state_dict = get_eva_state_dict(
            model, dataloader, config, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, adapter_name,
            gather_distributed_inputs, show_progress_bar, progress=progress,
        )  # fmt: skip
    directions = {name.removeprefix(PREFIX): rows for name, rows in eva_state_dict.items()}
    adjust = (config.eva_config or EvaConfig()).adjust_scaling_factors
    size, alpha = config.size_option, config.patterns["alpha_pattern"]
    ranks, alphas, kept, unseen = {}, {}, [], []
    for place, p in _adapted(base, adapter_name):
        rows, method = directions.get(p.path), p.method
        if rows is None:
            unseen.append(p.path)
        elif not rows.shape[-2]:
            unseat(place, host_of(place), adapter_name)
            continue
        else:
            r = rows.shape[-2]
            if r != method.rank_at(p.site):  # type: ignore[attr-defined]
                scaled = getattr(method, alpha) * (r / getattr(method, size) if adjust else 1)
                method = replace(method, **{size: r, alpha: scaled})
            _start(p, method, rows)
        kept.append(p.path)
        if getattr(p.method, size) != getattr(config, size):
            ranks[p.path] = getattr(p.method, size)
        if getattr(p.method, alpha) != getattr(config, alpha):
            alphas[p.path] = getattr(p.method, alpha)
    if config.ranks_may_move:
        config.rank_pattern, config.alpha_pattern = ranks, alphas
    if config.target_modules:
        config.target_modules = set(kept)
    if unseen:
        warnings.warn(
            f"EVA knows no inputs of {', '.join(unseen)}, which are neither linear layers nor convolutions (of an embedding's inputs each "
            f"direction would be a single token); they start as with {config.init_option}=True."
        )


def _adapted(base: nn.Module, name: str) -> list[tuple[Place, Adapter]]:
    """The layers that an adapter with free factors is on."""
    from ..core.adapter import Adapter
    from ..core.inlaid import places
    from ..core.place import Place

    return [
        (place, p)
        for place in places(base)
        if isinstance(place, Place) and isinstance(p := place.adapters.get(name), Adapter) and isinstance(p.method, Started)
    ]


def _start(p: Adapter, method: Any, rows: Tensor) -> None:
    """Give an adapter another rank, these rows as A, and B zero."""
    p.method, site = method, p.site
    p.__dict__.pop("_declared", None)
    rows = rows.to(site.device)
    placed = method.placed(site, rows, rows.new_zeros(*site.batch, site.size("out"), rows.shape[-2]))
    for name, value in zip(method.names(site), placed, strict=True):
        old = getattr(p, name)
        like = value.to(old.dtype, copy=True).contiguous()
        if like.shape == old.shape and old.device.type != "meta":
            old.data.copy_(like)
        else:
            p._parameters[name] = nn.Parameter(like, requires_grad=old.requires_grad)
