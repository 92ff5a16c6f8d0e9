"""CLoQ: start on a quantised base so that the layers' outputs stay (Deng et al. 2025, arXiv 2501.18475).

The factors make up for what quantising took of a weight as far as the layer's inputs see it; see `compensation` for the closed form.
The inputs come from a few batches of data. Where there are none, the model reads what it writes itself, which shows its inputs nearly
as well (Williams et al. 2024, arXiv 2410.17170): its own samples where it generates, tokens at random elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.families import acts_on_last_axis
from ..core.site import Embedding, Stack
from .calibration import Progress, SameInput, watching
from .compensation import compensate, quantised_layers
from .stacks import each_expert
from .svd import precise

if TYPE_CHECKING:
    from ..core.site import Site

# Batches (of keywords, of positional arguments, or a tensor), or a function that runs the model on some.
Calibration = Iterable[Any] | Callable[[], object]
# Bytes of moments that are collected in one pass over the data.
MEMORY = 2**31
# A share of the mean moment that is added to all: directions that no input takes count a little, and roots exist.
DAMPING = 0.01


def initialize_lora_cloq_weights(
    model: nn.Module,
    original: Any = None,
    calibration: Calibration | None = None,
    *,
    adapter_name: str = "default",
    iterations: int = 1,
    damping: float = DAMPING,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> None:
    """Start the factors of a LoRA adapter on a quantised base so that the layers' outputs are as near as they can be to those before.

    The adapter's configuration and file stay those of LoRA.

    Args:
        model: a quantised base with the adapter on it, whose values are replaced.
        original: the base's safetensors file, or its folder, or the model before quantisation; where None, what the base was loaded
            from, on this machine. It is read a weight at a time.
        calibration: some batches of the data to come (a few thousand tokens), or a function that runs the model on them; they are run
            once for every ``memory`` bytes of moments. Where None, the model reads its own samples.
        iterations: beyond 1, the base is quantised again, too, in turn with the factors. It is another base then, which has to be
            saved along with the adapter.
        damping: share of the mean moment of a layer's inputs that is added to all directions.
        memory: bytes of moments to collect in one pass over the data.
        progress: called with the number of layers that are done, and of all.

    Raises:
        ValueError: no adapted layer is quantised, a weight is not found, the adapter has no factors A and B, or a layer met no input
            or none that is finite.
    """
    from ..core.targets import bare_model
    from ..operations.original import original_weights

    base = bare_model(model)
    found = {f"{place.path}.{place.name}": (place, p) for place, p in quantised_layers(base, adapter_name)}
    read = original_weights(base, original)
    run = running(base, calibration)
    rooted, done = Rooted(damping), 0
    for group in in_groups({name: place.site for name, (place, _) in found.items()}, memory):
        moments = second_moments(base, group, run)
        for name in group:
            place, p = found[name]
            compensate(place, p, read(name), rooted(moments.pop(name)), iterations)
            done += 1
            if progress is not None:
                progress(done, len(found))


# ---- inputs ---------------------------------------------------------------------------------------------------------------
def in_groups(sites: Mapping[str, Site], memory: int) -> Iterator[dict[str, Site]]:
    """Layers whose moments fit into memory together; at least one."""
    group: dict[str, Site] = {}
    taken = 0
    for name, site in sites.items():
        width = site.size("in")
        size = 4 * width * (1 if isinstance(site, Embedding) else width) * site.batch.numel()
        if group and taken + size > memory:
            yield group
            group, taken = {}, 0
        group[name] = site
        taken += size
    if group:
        yield group


@torch.no_grad()
def second_moments(base: nn.Module, sites: Mapping[str, Site], run: Callable[[], object]) -> dict[str, Tensor]:
    """The sum of ``x x'`` over the inputs of each layer without adapters, ``(*batch, in, in)``; of an embedding its diagonal, ``(in,)``.

    Positions that an attention mask leaves out do not count. Layers that are given one tensor have their sum in common.

    Raises:
        ValueError: a layer met no input, or one that is not finite; or it has no such inputs.
    """
    from ..core.inlaid import session_of

    sums: dict[str, Tensor] = {}
    leaders: dict[str, str] = {}
    first = SameInput()
    mask: list[Tensor | None] = [None]

    def rows(x: Tensor) -> Tensor:
        kept = mask[0]
        if kept is not None and x.shape[:2] == kept.shape:
            return x[kept.to(x.device, torch.bool)]
        return x

    def see(name: str, args: tuple[Any, ...]) -> None:
        x = args[0].detach()
        leader = leaders.setdefault(name, first(args[0], lambda: name))
        if leader == name:
            add(name, rows(x))

    def add(name: str, x: Tensor, expert: int | None = None) -> None:
        site = sites[name]
        if isinstance(site, Embedding):
            found = torch.bincount(x.reshape(-1), minlength=site.size("in")).float()
        else:
            x = x.reshape(-1, x.shape[-1]).float()
            found = x.mT @ x
        if expert is None:
            sums[name] = found if name not in sums else sums[name].add_(found)
        else:
            if name not in sums:
                sums[name] = found.new_zeros(*site.batch, *found.shape)
            sums[name][expert] += found

    def masked(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get("attention_mask")
        mask[0] = given if isinstance(given, Tensor) and given.ndim == 2 else None

    session = session_of(base)
    training = base.training
    base.eval()
    try:
        with ExitStack() as stack:
            stack.enter_context(session.local(()) if session is not None else nullcontext())
            stack.callback(base.register_forward_pre_hook(masked, with_kwargs=True).remove)
            plain = {}
            for name, site in sites.items():
                if isinstance(site, Stack):
                    stack.enter_context(each_expert(site, lambda i, x, name=name: add(name, x, i)))
                elif isinstance(site, Embedding) or acts_on_last_axis(site):
                    plain[name] = site.module
                else:
                    raise ValueError(f"CLoQ needs what a layer's weight multiplies, and {name!r} is of a {type(site.module).__name__}.")
            stack.enter_context(watching(plain, see))
            run()
    finally:
        base.train(training)
    for name, leader in leaders.items():
        sums[name] = sums[leader]
    for name in sites:
        if name not in sums:
            raise ValueError(f"{name!r} met no input in the calibration; run the whole model, or take the layer out of the targets.")
        if not sums[name].isfinite().all():
            raise ValueError(f"The inputs of {name!r} in the calibration are not finite.")
    return sums


def root(moments: Tensor, damping: float = DAMPING) -> Tensor:
    """``R`` with ``R R' = H``, the moments scaled to a mean of 1 and damped; of a diagonal the roots themselves."""
    h = precise(moments)
    diagonal = h if h.ndim == 1 else h.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    # An expert that met no input counts all directions alike.
    h = h / mean.where(mean > 0, torch.ones_like(mean)).view(*mean.shape, *(1 for _ in range(h.ndim - diagonal.ndim)))
    if h.ndim == 1:
        return (h + damping).sqrt()
    eye = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    while True:
        found, failed = torch.linalg.cholesky_ex(h + damping * eye)
        if not failed.any():
            return found
        damping = max(2 * damping, torch.finfo(h.dtype).eps)


class Rooted:
    """`root`, taken once for layers in a row that have their moments in common."""

    def __init__(self, damping: float) -> None:
        self.damping = damping
        self.last: tuple[Tensor, Tensor] | None = None

    def __call__(self, moments: Tensor) -> Tensor:
        if self.last is None or self.last[0] is not moments:
            self.last = moments, root(moments, self.damping)
        return self.last[1]


# ---- data -----------------------------------------------------------------------------------------------------------------
def running(base: nn.Module, calibration: Calibration | None) -> Callable[[], object]:
    """Runs the model on the calibration data, or on its own samples; as often as it is called."""
    if callable(calibration):
        return calibration
    batches = own_samples(base) if calibration is None else calibration
    if iter(batches) is batches:
        batches = list(batches)
    device = next(base.parameters()).device

    def run() -> None:
        for batch in batches:
            if isinstance(batch, Mapping):
                base(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
            else:
                base(*(t.to(device) for t in (batch if isinstance(batch, (tuple, list)) else (batch,))))

    return run


@torch.no_grad()
def own_samples(base: Any, rows: int = 32, length: int = 128, seed: int = 0) -> list[dict[str, Tensor]]:
    """Tokens for a model to read: each row begins with one at random and goes on as the model does, where it generates.

    Raises:
        ValueError: it does not read tokens.
    """
    config = base.config.get_text_config() if hasattr(getattr(base, "config", None), "get_text_config") else None
    words = getattr(config, "vocab_size", None)
    if not words:
        raise ValueError(
            "Give `calibration`: the model does not say what tokens it reads, so it makes none. `replace_lora_weights_loftq` needs no data."
        )
    device = next(base.parameters()).device
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    encodes = bool(getattr(config, "is_encoder_decoder", False))
    writes = not encodes and getattr(base, "can_generate", lambda: False)()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        tokens = torch.randint(words, (rows, 1 if writes else length)).to(device)
        if writes:
            tokens = _continued(base, tokens, length)
    return [{"input_ids": part} | ({"decoder_input_ids": part} if encodes else {}) for part in tokens.split(8)]


def _continued(base: Any, tokens: Tensor, length: int) -> Tensor:
    from transformers import GenerationConfig

    from ..core.inlaid import session_of

    new = length - tokens.shape[1]
    drawn = GenerationConfig(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, min_new_tokens=new, max_new_tokens=new, pad_token_id=0)
    session, training = session_of(base), base.training
    base.eval()
    try:
        with session.local(()) if session is not None else nullcontext():
            return base.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), generation_config=drawn)
    finally:
        base.train(training)
