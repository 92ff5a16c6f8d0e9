"""FourierFT: ``W + s Re(ifft2(S))`` with a spectrum S of few trained entries at random places (Gao et al. 2024, arXiv 2405.03003)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..core.additive import add
from ..core.config import PeftType
from ..core.families import acts_on_last_axis
from ..core.method import Method, full, register
from ..core.param import Param, normal, zeros
from ..core.site import Site
from ..kernels import lowrank
from ..kernels.spread import remembered, sampled, scattered
from .spread import Spread

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner


@register
@dataclass
class FourierFTConfig(Spread):
    """Few frequencies of the update.

    Args:
        n_frequency: how many frequencies are trained at each weight.
        scaling: the factor in front of the update.
        random_loc_seed: seed of the places of the frequencies, which are in no file.
        fan_in_fan_out: for HF's signature; the layout of a layer is known from its type.
        n_frequency_pattern: other numbers of frequencies by pattern of module names.
        init_weights: start from the base; False, the method's default, starts from normal numbers.

    Raises:
        ValueError: the number of frequencies or the seed is no fit integer.
    """

    peft_type: str | None = PeftType.FOURIERFT
    n_frequency: int = field(default=1000, metadata={"help": "Number of frequencies."})
    scaling: float = field(default=150.0, metadata={"help": "The factor in front of the update."})
    random_loc_seed: int | None = field(default=777, metadata={"help": "Seed of the frequencies' places."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Ignored: a layer's layout is known from its type."})
    n_frequency_pattern: dict[str, int] | None = field(default_factory=dict, metadata={"help": "Other numbers by module pattern."})
    init_weights: bool = field(default=False, metadata={"help": "Start from the base."})

    prefix: ClassVar[str] = "fourierft_"
    paper: ClassVar[str] = "2405.03003"
    equation: ClassVar[str] = "W + s Re(ifft2(S))"
    size_option: ClassVar[str] = "n_frequency"
    patterns: ClassVar[dict[str, str]] = {"n_frequency_pattern": "n_frequency"}
    ours: ClassVar[frozenset[str]] = Method.ours - {"bias"}
    examples: ClassVar[dict[str, dict[str, Any]]] = {
        "": {"n_frequency": 7, "scaling": 9.0, "init_weights": True},
        "random": {"n_frequency": 5, "random_loc_seed": 3},
        "dropout": {"n_frequency": 6, "input_dropout": 0.3},
    }

    def __post_init__(self) -> None:
        if self.bias == "fourier_only":
            # HF's documentation calls it so.
            self.bias = "fourierft_only"
        super().__post_init__()
        check_places(self.n_frequency, self.random_loc_seed)

    @property
    def never_identity(self) -> str:
        return "" if self.init_weights else "the spectrum starts from random numbers (init_weights=False)"

    def default_targets(self) -> dict[str, list[str] | str]:
        return super().default_targets() | {"gpt2": ["mlp.c_proj"], "gpt_bigcode": ["mlp.c_proj"]}

    def refuses(self, site: Site) -> str | None:
        return too_many(self.n_frequency, site)

    def params(self, site: Site) -> dict[str, Param]:
        return {
            "fourierft_spectrum": Param((self.n_frequency,), zeros if self.init_weights else normal()),
            "fourierft_places": places_param(self.n_frequency),
        }

    def derive(self, p: Adapter) -> None:
        p.fourierft_places.copy_(random_places(self.random_loc_seed, p.site.size("out") * p.site.size("in"), self.n_frequency))

    def delta_apart(self, site: Site) -> tuple[str, ...]:
        return ("out",)

    def values(self, p: Adapter) -> tuple[Tensor]:
        return (p.fourierft_spectrum,)

    def spread(self, p: Adapter, *values: Tensor) -> Tensor:
        out, inp = p.site.size("out"), p.site.size("in")
        if not p.all_rows:
            return self._some_rows(p, *values)
        places, share, *_ = remembered(p.fourierft_places, half_plane, out, inp)
        (spectrum,) = values
        half = scattered(self.scaling * full(spectrum) * share.to(full(spectrum)), places, (out, inp // 2 + 1))
        # The spectrum is real, so the delta is the same when it is turned half around: the upper rows tell the lower ones. The
        # imaginary part of a constant row is left out by the inverse of a real transform, as it should be.
        upper = torch.fft.irfft(torch.fft.ihfft(half, dim=-2), inp)
        lower = upper[..., 1 : out - out // 2, :].flip(-2, -1).roll(1, -1)
        return torch.cat((upper, lower), -2)

    def _some_rows(self, p: Adapter, spectrum: Tensor) -> Tensor:
        """The same for a part of the rows: along the columns, the few frequencies are added up one by one."""
        out, inp, half = p.whole.size("out"), p.site.size("in"), p.site.size("in") // 2 + 1
        places, share, *_ = half_plane(p.fourierft_places, out, inp)
        spectrum = full(spectrum)
        rows = torch.arange(p.first_row, p.first_row + p.site.size("out"), device=places.device)
        # Whole turns are left out before numbers are rounded.
        turns = (rows.unsqueeze(-1) * (places // half) % out).to(spectrum.dtype) * (2 * torch.pi / out)
        waves = torch.polar((self.scaling / out * spectrum * share.to(spectrum)).expand_as(turns), turns)
        return torch.fft.irfft(waves.new_zeros(len(rows), half).index_add_(1, places % half, waves), inp)

    def gather(self, p: Adapter, g: Tensor, x: Tensor, *values: Tensor) -> tuple[Tensor]:
        """The transform of ``g' x`` is the product of the transforms of g and x."""
        out, inp = p.site.size("out"), p.site.size("in")
        *_, pairs, sign = remembered(p.fourierft_places, half_plane, out, inp)
        real, imaginary = sampled(g, x, pairs, _transformed).chunk(2)
        return (torch.addcmul(real, imaginary, sign.to(real)).mul_(self.scaling / (out * inp)),)

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        if not acts_on_last_axis(inner.site) or x.numel() > lowrank.FEW_ROWS * x.shape[-1] or self.dropout:
            return super().around(p, inner, x)
        # Few rows pass through the few frequencies.
        y, spectrum = inner(x), full(p.fourierft_spectrum)
        out, inp = p.site.size("out"), p.site.size("in")
        row, column = p.fourierft_places // inp, p.fourierft_places % inp
        # The rest of the spectrum of a real input is the conjugate of the first half.
        xhat = torch.fft.fft(x.to(spectrum.dtype)).conj().index_select(-1, column) * spectrum
        yhat = xhat.new_zeros(*x.shape[:-1], out).index_add(-1, row, xhat)
        return add(y, torch.fft.ifft(yhat).real, self.scaling / inp * p.strength)


# ---- random places, which WaveFT has as well ----------------------------------------------------------------------------------
def check_places(count: int, seed: int | None) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count <= 0:
        raise ValueError(f"`n_frequency` should be a positive integer, not {count!r}.")
    if not isinstance(seed, int):
        raise ValueError(f"`random_loc_seed` should be an integer, not {seed!r}: files do not hold the places, so they must come back.")


def too_many(count: int, site: Site) -> str | None:
    size = site.size("out") * site.size("in")
    return f"its weight has {size} entries, fewer than n_frequency={count}" if count > size else None


def places_param(count: int) -> Param:
    return Param((count,), zeros, trainable=False, persistent=False, batched=False, dtype=torch.int64)


@lru_cache(maxsize=16)
def random_places(seed: int, size: int, count: int) -> Tensor:
    """Flat places in a matrix, drawn as HF peft draws them."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].clone()


def half_plane(places: Tensor, out: int, inp: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Real transforms know half of the columns; the rest mirror them.

    Returns:
        Flat places in ``(out, inp // 2 + 1)``; the share of a number that is to stand there; flat places of the real and then of the
        imaginary parts in the product of both transforms (see `_transformed`); the sign there of the product of the imaginary parts.
    """
    half = inp // 2 + 1
    row, column = places // inp, places % inp
    mirrored = 2 * column > inp
    row = torch.where(mirrored, -row % out, row)
    column = torch.where(mirrored, inp - column, column)
    alone = (column == 0) | (2 * column == inp)
    share = torch.where(alone, 1.0, 0.5)
    opposite = 2 * row > out
    real = 4 * half * torch.where(opposite, out - row, row) + 2 * column
    return row * half + column, share, torch.cat((real, real + 2 * half + 1)), torch.where(opposite, 1.0, -1.0)


def _transformed(rows: Tensor) -> Tensor:
    """The transforms of rows, the real and imaginary parts of a frequency one after the other, with the rows last."""
    return torch.view_as_real(torch.fft.rfft(rows)).flatten(1).t()
