"""EVA: A starts from the principal directions of a layer's inputs, and ranks go where they explain most (arXiv 2410.07170).

The directions are found while the data streams by: what was found so far and the next batch are decomposed together, until the
directions stay. B starts from zero, so the adapter starts from the base.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import ref

import torch
from torch import Tensor, nn

from ..core.families import acts_on_last_axis
from .calibration import Progress, targets, watching
from .svd import SEED, orthonormal, precise, singular_vectors

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


# ---- principal directions of a stream -----------------------------------------------------------------------------------
class StreamedDirections:
    """The principal directions of rows that come in batches, about their mean.

    Args:
        k: how many.

    Attributes:
        directions: ``(k, n)``, by falling variance; their largest entries are positive.
        values: ``(k,)``, singular values of all rows so far about their mean.
        cosines: ``(k,)``, of each direction with its predecessor. As in HF peft, one whose largest entry moved to a place of the
            other sign counts as turned round, and takes some steps more to be found.
    """

    ITERATIONS: ClassVar[int] = 3

    def __init__(self, k: int) -> None:
        self.k, self.count = k, 0
        self.mean = self.directions = self.values = self.cosines = None
        self.variation = 0.0
        self.waiting: list[Tensor] = []

    @property
    def shares(self) -> Tensor:
        """The share of all variance that each direction explains."""
        assert self.values is not None
        return self.values.double().square() / max(self.variation, torch.finfo(torch.float64).tiny)

    def add(self, rows: Tensor) -> bool:
        """Take in a batch ``(rows, n)``. Less rows than directions wait for more; returns whether the directions are new."""
        self.waiting.append(rows.detach().float())
        if sum(map(len, self.waiting)) < self.k:
            return False
        x, self.waiting = torch.cat(self.waiting), []
        n, mean = len(x), x.mean(0)
        x = x - mean
        self.variation += torch.linalg.vector_norm(x, dim=0).double().square().sum().item()
        before = self.directions
        if before is not None:
            assert self.mean is not None
            assert self.values is not None
            shift = (self.mean - mean) * (self.count * n / (self.count + n)) ** 0.5
            self.variation += shift.double().square().sum().item()
            x = torch.cat((self.values.unsqueeze(-1) * before, x, shift.unsqueeze(0)))
            mean = self.mean + (mean - self.mean) * (n / (self.count + n))
        self.mean, self.count = mean, self.count + n
        self.values, directions = self._decompose(x, before)
        self.directions = directions * directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
        self.cosines = None if before is None else (self.directions * before).sum(1)
        return True

    def _decompose(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """The k largest singular values of ``x`` and their right vectors, by subspace iteration from those before."""
        width = 2 * self.k
        if 2 * width >= min(x.shape):
            _, s, v = singular_vectors(x, min(self.k, *x.shape))
            return s.float(), v.mT.float()
        fresh = width if before is None else self.k
        drawn = torch.randn(x.shape[1], fresh, generator=torch.Generator().manual_seed(SEED)).to(x)
        q = drawn if before is None else torch.cat((before.mT, drawn), 1)
        for _ in range(self.ITERATIONS + (before is None)):
            q = orthonormal(x.mT @ (x @ q))
        seen = precise(x @ q)
        squares, turn = torch.linalg.eigh(seen.mT @ seen)
        order = slice(width - self.k, None)
        return squares[order].flip(0).clamp_min(0).sqrt().float(), (turn[:, order].flip(1).to(q).mT @ q.mT)


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


def _tensor(layer_input: Any, name: str) -> Tensor:
    first = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    if not isinstance(first, Tensor):
        raise TypeError(f"The input of {name!r} is a {type(first).__name__}; pass a `prepare_layer_inputs_fn` that makes rows of it.")
    return first


def _gathered(rows: Tensor) -> Tensor:
    """The rows of all processes."""
    dist = torch.distributed
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    most = max(int(c) for c in counts)
    padded = torch.cat((rows, rows.new_zeros(most - len(rows), rows.shape[1])))
    found = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(found, padded)
    return torch.cat([part[: int(c)] for part, c in zip(found, counts, strict=True)])


def _moved(inputs: Any, device: torch.device) -> Any:
    if hasattr(inputs, "to"):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {k: _moved(v, device) for k, v in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return type(inputs)(_moved(v, device) for v in inputs)
    return inputs


def _again_and_again(batches: Iterable[Any], heard: Callable[[], int]) -> Iterator[Any]:
    """The batches, pass after pass.

    Raises:
        ValueError: there are none, or a whole pass had less rows than directions are looked for.
    """
    while True:
        before, empty = heard(), True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError("The dataloader is empty.")
        if heard() == before:
            raise ValueError(
                "A whole pass through the data has less rows than directions are looked for; give more data, or lower r or rho."
            )


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
        ``(rank, in)`` by module name; a rank may be 0.

    Raises:
        ValueError: no linear layer is meant, or there is no data, or not enough.
    """
    from ..core.inlaid import session_of
    from ..core.targets import bare_model

    base = bare_model(model)
    session = session_of(base)
    if peft_config is None:
        if session is None:
            raise ValueError("`peft_config` is needed for a model without adapters.")
        peft_config = session.configs[adapter_name]
    prefix = PREFIX if base is not model else ""
    if session is not None and adapter_name in session.configs:
        sites = {p.path: p.site for _, p in _adapted(base, adapter_name)}
    else:
        sites = targets(base, peft_config)
    sites = {name: site for name, site in sites.items() if acts_on_last_axis(site) and not site.reads}
    if not sites:
        raise ValueError("EVA looks at the inputs of linear layers, and none is among the targets.")
    by_layer = {f"{prefix}{n}": f for n, f in _functions(prepare_layer_inputs_fn, {prefix + n: n for n in sites}).items()}
    training = model.training
    model.eval()
    try:
        with nullcontext() if session is None else session.local(()):
            found = _stream(
                model,
                dataloader,
                peft_config,
                sites,
                forward_fn,
                prepare_model_inputs_fn,
                by_layer,
                prefix,
                gather_distributed_inputs,
                progress,
            )
    finally:
        model.train(training)
    return {prefix + name: rows for name, rows in found.items()}


def _functions(given: Any, names: dict[str, str]) -> dict[str, Callable[..., Tensor]]:
    if isinstance(given, Mapping):
        unknown = [n for n in given if n not in names and n not in names.values()]
        if unknown:
            raise ValueError(f"prepare_layer_inputs_fn names layers that are not among the targets: {', '.join(unknown)}.")
        return {own: given.get(full, given.get(own)) or _all_rows for full, own in names.items()}
    return dict.fromkeys(names.values(), given or _all_rows)


def _stream(
    model: nn.Module,
    dataloader: Iterable[Any],
    config: Any,
    sites: dict[str, Site],
    forward_fn: Callable[[nn.Module, Any], Any],
    prepare_model: Callable[[Any, Any], Any] | None,
    by_layer: dict[str, Callable[..., Tensor]],
    prefix: str,
    gather: bool,
    progress: Progress | None,
) -> dict[str, Tensor]:
    options: EvaConfig = config.eva_config or EvaConfig()
    ranks = {name: config.at(name).r for name in sites}
    rho = min(options.rho, max(max(site.shape) for site in sites.values()) // config.r) if options.rho > 1000 else options.rho
    most = {name: round(r * rho) for name, r in ranks.items()}
    for name, site in sites.items():
        most[name] = min(most[name], site.size("in"))
    gather = gather and torch.distributed.is_available() and torch.distributed.is_initialized()
    device = next(iter(sites.values())).device
    leaders: dict[str, str] = {}
    streams: dict[str, StreamedDirections] = {}
    wanted = dict(most)
    open_, prepared = set(sites), None

    def meet(name: str, args: tuple[Any, ...]) -> None:
        """Find out which layers are given the same tensor."""
        for other, tensor in met.items():
            if tensor() is args[0] and by_layer[prefix + other] is by_layer[prefix + name]:
                leaders[name] = other
                return
        met[name], leaders[name] = ref(args[0]), name

    def see(name: str, args: tuple[Any, ...]) -> None:
        if name in open_:
            rows = by_layer[prefix + name](args, prepared, name)
            streams[name].add(_gathered(rows) if gather else rows)

    batches = _again_and_again(dataloader, lambda: sum(s.count for s in streams.values()))
    for batch in batches:
        batch = _moved(batch, device)
        prepared = batch if prepare_model is None else prepare_model(batch, config)
        if not streams:
            met: dict[str, ref[Tensor]] = {}
            with watching({name: site.module for name, site in sites.items()}, meet):
                forward_fn(model, batch)
            absent = next((name for name in sites if name not in leaders), None)
            if absent is not None:
                raise ValueError(f"{absent!r} was not called in a forward pass; take it out of the targets.")
            for name, leader in leaders.items():
                most[leader] = max(most[leader], most[name])
            most = {name: most[leaders[name]] for name in sites}
            wanted = dict(most)
            streams = {name: StreamedDirections(most[name]) for name in sites if leaders[name] == name}
        open_ = {name for name, s in streams.items() if not _found(s, wanted[name], options.tau)}
        if progress is not None:
            progress(sum(leaders[name] not in open_ for name in sites), len(sites))
        if not open_:
            break
        with watching({name: sites[name].module for name in open_}, see):
            forward_fn(model, batch)
        if all(s.directions is not None for s in streams.values()):
            shares = {name: streams[leaders[name]].shares[: most[name]] for name in [*streams, *(n for n in sites if n not in streams)]}
            wanted = distribute(shares, sum(ranks.values()))
    return {name: _directions(streams[leaders[name]], wanted[name], options.whiten) for name in sites}


def _found(stream: StreamedDirections, count: int, tau: float) -> bool:
    if count == 0:
        return stream.directions is not None
    return stream.cosines is not None and bool((stream.cosines[:count] >= tau).all())


def _directions(stream: StreamedDirections, count: int, whiten: bool) -> Tensor:
    assert stream.directions is not None
    assert stream.values is not None
    found = stream.directions[:count].clone()
    return found / stream.values[:count].sqrt().unsqueeze(-1) if whiten else found


def distribute(shares: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Ranks for layers: the ``budget`` directions that explain the largest shares of their layers' variance, wherever they are."""
    owners = [name for name, values in shares.items() for _ in values]
    order = torch.cat([values.cpu() for values in shares.values()]).argsort(descending=True, stable=True)
    ranks = dict.fromkeys(shares, 0)
    for i in order[:budget].tolist():
        ranks[owners[i]] += 1
    return ranks


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
    if getattr(config, "init_lora_weights", None) != "eva":
        raise ValueError("`initialize_lora_eva_weights` is for adapters with init_lora_weights='eva'.")
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("Give a `dataloader`, or an `eva_state_dict` that was computed before.")
        eva_state_dict = get_eva_state_dict(
            model, dataloader, config, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, adapter_name,
            gather_distributed_inputs, show_progress_bar, progress=progress,
        )  # fmt: skip
    directions = {name.removeprefix(PREFIX): rows for name, rows in eva_state_dict.items()}
    adjust = (config.eva_config or EvaConfig()).adjust_scaling_factors
    ranks, alphas, kept, unseen = {}, {}, [], []
    for place, p in _adapted(base, adapter_name):
        rows, method = directions.get(p.path), p.method
        if rows is None:
            unseen.append(p.path)
        elif not len(rows):
            unseat(place, host_of(place), adapter_name)
            continue
        else:
            alpha = method.lora_alpha * len(rows) / method.r if adjust and len(rows) != method.r else method.lora_alpha  # type: ignore[attr-defined]
            _start(p, replace(method, r=len(rows), lora_alpha=alpha), rows)
        kept.append(p.path)
        if p.method.r != config.r:  # type: ignore[attr-defined]
            ranks[p.path] = p.method.r  # type: ignore[attr-defined]
        if p.method.lora_alpha != config.lora_alpha:  # type: ignore[attr-defined]
            alphas[p.path] = p.method.lora_alpha  # type: ignore[attr-defined]
    config.rank_pattern, config.alpha_pattern = ranks, alphas
    if config.target_modules:
        config.target_modules = set(kept)
    if unseen:
        warnings.warn(f"EVA knows no inputs of {', '.join(unseen)}, which are no linear layers; they start as with init_lora_weights=True.")


def _adapted(base: nn.Module, name: str) -> list[tuple[Place, Adapter]]:
    """The layers that an adapter of LoRA is on."""
    from ..core.adapter import Adapter
    from ..core.inlaid import places
    from ..core.place import Place
    from ..methods.lora import LoraConfig

    return [
        (place, p)
        for place in places(base)
        if isinstance(place, Place) and isinstance(p := place.adapters.get(name), Adapter) and isinstance(p.method, LoraConfig)
    ]


def _start(p: Adapter, method: Any, rows: Tensor) -> None:
    """Give an adapter another rank, these rows as A, and B zero."""
    p.method = method
    p.__dict__.pop("_declared", None)
    a, b = method.names(p.site)
    for name, value in ((a, rows), (b, rows.new_zeros(p.site.size("out"), len(rows)))):
        old = getattr(p, name)
        like = value.to(p.site.device, old.dtype, copy=True).contiguous()
        if like.shape == old.shape and old.device.type != "meta":
            old.data.copy_(like)
        else:
            p._parameters[name] = nn.Parameter(like, requires_grad=old.requires_grad)
