"""WaveFT: ``W + s idwt(S)`` with wavelet coefficients S of which few at random places are trained (Bilican et al. 2025,
arXiv 2505.12532)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.config import PeftType, nearest
from ..core.method import Method, full, register
from ..core.param import Param, normal, zeros
from ..core.site import Site
from ..kernels.spread import remembered, sampled, scattered
from ..kernels.wavelets import LOW_PASS, analysis, padding, synthesis, waves
from .fourierft import check_places, places_param, random_places, too_many
from .spread import Spread, entries

if TYPE_CHECKING:
    from ..core.adapter import Adapter


@register
@dataclass
class WaveFTConfig(Spread):
    """Few wavelet coefficients of the update.

    Args:
        n_frequency: how many coefficients are trained at each weight.
        scaling: the factor in front of the update.
        wavelet_family: ``db1`` (Haar) to ``db10``, ``sym2`` to ``sym10`` or ``coif1`` to ``coif5``.
        use_idwt: the update is made of wavelets; False makes it of single entries.
        random_loc_seed: seed of the places of the coefficients, which are in no file.
        fan_in_fan_out: for HF's signature; the layout of a layer is known from its type.
        n_frequency_pattern: other numbers of coefficients by pattern of module names.
        proportional_parameters: share out the coefficients by the sizes of the weights, with ``n_frequency`` on average.
        init_weights: start from the base; False starts from small random numbers, for tests.

    Raises:
        ValueError: the number of coefficients or the seed is no fit integer, or the family is unknown.
    """

    peft_type: str | None = PeftType.WAVEFT
    n_frequency: int = field(default=2592, metadata={"help": "Number of coefficients."})
    scaling: float = field(default=25.0, metadata={"help": "The factor in front of the update."})
    wavelet_family: str = field(default="db1", metadata={"help": "The family of wavelets."})
    use_idwt: bool = field(default=True, metadata={"help": "Wavelets, or single entries."})
    random_loc_seed: int = field(default=777, metadata={"help": "Seed of the coefficients' places."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Ignored: a layer's layout is known from its type."})
    n_frequency_pattern: dict[str, int] | None = field(default_factory=dict, metadata={"help": "Other numbers by module pattern."})
    proportional_parameters: bool = field(default=False, metadata={"help": "More coefficients for larger weights."})
    init_weights: bool = field(default=True, metadata={"help": "Start from the base."})

    prefix: ClassVar[str] = "waveft_"
    paper: ClassVar[str] = "2505.12532"
    equation: ClassVar[str] = "W + s idwt(S)"
    patterns: ClassVar[dict[str, str]] = {"n_frequency_pattern": "n_frequency"}
    ours: ClassVar[frozenset[str]] = Method.ours - {"bias"}
    examples: ClassVar[dict[str, dict[str, Any]]] = {
        "": {"n_frequency": 7, "scaling": 3.0},
        "longer": {"n_frequency": 6, "scaling": 3.0, "wavelet_family": "sym3"},
        "entries": {"n_frequency": 7, "scaling": 3.0, "use_idwt": False},
        "proportional": {"n_frequency": 5, "scaling": 3.0, "proportional_parameters": True},
        "dropout": {"n_frequency": 6, "scaling": 3.0, "input_dropout": 0.3},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_places(self.n_frequency, self.random_loc_seed)
        if self.wavelet_family not in LOW_PASS:
            known = f"{nearest(self.wavelet_family, LOW_PASS)} Known: {', '.join(LOW_PASS)}."
            raise ValueError(f"Unknown wavelet_family={self.wavelet_family!r}.{known}")

    @property
    def size_option(self) -> str:  # type: ignore[override]
        # In proportion, the numbers follow from the layers' sizes.
        return "" if self.proportional_parameters else "n_frequency"

    def default_targets(self) -> dict[str, list[str] | str]:
        return super().default_targets() | {"gpt2": ["mlp.c_proj"], "gpt_bigcode": ["mlp.c_proj"]}

    def prepare(self, base: nn.Module) -> None:
        if not self.proportional_parameters:
            return
        from ..core.targets import explain_targets

        whole = replace(self, proportional_parameters=False, n_frequency=1, n_frequency_pattern={})
        sizes = {t.name: t.site.size("out") * t.site.size("in") for t in explain_targets(base, whole).targets}
        of_one = self.n_frequency * len(sizes) / max(sum(sizes.values()), 1)
        # No field: it follows from the base, and files have the options that it came from.
        self._shares = {name: max(1, round(size * of_one)) for name, size in sizes.items()}

    def at(self, path: str) -> Method:
        found = super().at(path)
        share = getattr(self, "_shares", {}).get(path)
        return found if share is None else replace(found, n_frequency=share).variant()

    def refuses(self, site: Site) -> str | None:
        return None if self.proportional_parameters else too_many(self.n_frequency, site)

    def params(self, site: Site) -> dict[str, Param]:
        return {
            "waveft_spectrum": Param((self.n_frequency,), zeros if self.init_weights else normal(0.01)),
            "waveft_places": places_param(self.n_frequency),
        }

    def derive(self, p: Adapter) -> None:
        p.waveft_places.copy_(random_places(self.random_loc_seed, p.site.size("out") * p.site.size("in"), self.n_frequency))

    def values(self, p: Adapter) -> tuple[Tensor]:
        return (p.waveft_spectrum,)

    def spread(self, p: Adapter, *values: Tensor) -> Tensor:
        out, inp = p.site.size("out"), p.site.size("in")
        (spectrum,) = values
        spectrum = self.scaling * full(spectrum)
        if not self.use_idwt:
            return entries(p, spectrum, p.waveft_places, inp)
        if not p.all_rows:
            return self._some_rows(p, spectrum)
        if len(LOW_PASS[self.wavelet_family]) == 2:
            # The shortest wavelets are four numbers each.
            places, numbers = remembered(p.waveft_places, _short_waves, out, inp, self.wavelet_family)
            return scattered((spectrum.unsqueeze(-1) * numbers.to(spectrum)).flatten(-2), places, (out, inp))
        coefficients = scattered(spectrum, _in_bands(p.waveft_places, out, inp, self.wavelet_family), self._padded(out, inp))
        rows = synthesis(coefficients, self.wavelet_family)[..., :out, :]
        return synthesis(rows, self.wavelet_family, dim=-1)[..., :inp]

    def _some_rows(self, p: Adapter, spectrum: Tensor) -> Tensor:
        """The same for a part of the rows: down the columns, the few wavelets are added up one by one."""
        out, inp = p.whole.size("out"), p.site.size("in")
        _, wide = self._padded(out, inp)
        places = _in_bands(p.waveft_places, out, inp, self.wavelet_family)
        row, down = waves(places // wide, out, self.wavelet_family)
        numbers, places = spectrum.unsqueeze(-1) * down.to(spectrum), row * wide + (places % wide).unsqueeze(-1)
        found = entries(p, numbers.flatten(), places.flatten(), wide)
        return synthesis(found, self.wavelet_family, dim=-1)[..., :inp]

    def delta_apart(self, site: Site) -> tuple[str, ...]:
        return ("out",)

    def _padded(self, out: int, inp: int) -> tuple[int, int]:
        return _even(out + padding(self.wavelet_family)), _even(inp + padding(self.wavelet_family))

    def gather(self, p: Adapter, g: Tensor, x: Tensor, *values: Tensor) -> tuple[Tensor]:
        """The coefficients of ``g' x`` are products of those of g and x."""
        if not self.use_idwt:
            return (sampled(g, x, p.waveft_places).mul_(self.scaling),)
        places = remembered(p.waveft_places, _in_bands, g.shape[1], x.shape[1], self.wavelet_family)
        return (sampled(g, x, places, self._bands).mul_(self.scaling),)

    def _bands(self, rows: Tensor) -> Tensor:
        return analysis(F.pad(rows, (0, rows.shape[1] % 2)).t().contiguous(), self.wavelet_family)


def _short_waves(places: Tensor, out: int, inp: int, family: str) -> tuple[Tensor, Tensor]:
    """Flat places in ``(out, inp)``, coefficient by coefficient, and what each brings there: ``(k * 4,)`` and ``(k, 4)``."""
    places = _in_bands(places, out, inp, family)
    wide = _even(inp + padding(family))
    (row, down), (column, along) = waves(places // wide, out, family), waves(places % wide, inp, family)
    return (row.unsqueeze(-1) * inp + column.unsqueeze(-2)).flatten(), (down.unsqueeze(-1) * along.unsqueeze(-2)).flatten(1)


def _even(size: int) -> int:
    return size + size % 2


def _in_bands(places: Tensor, out: int, inp: int, family: str) -> Tensor:
    """Flat places in ``(out, inp)`` as flat places among the padded coefficients, low pass first on both axes.

    HF peft takes the upper right quarter for what is high-pass down the columns and low-pass along the rows, and the lower left
    one the other way round.
    """
    high, wide = _even(out + padding(family)), _even(inp + padding(family))
    row, column = places // inp + (high - out) // 2, places % inp + (wide - inp) // 2
    lower, right = row >= high // 2, column >= wide // 2
    turn = torch.where(lower, 1, -1) * (lower != right)
    return (row - turn * (high // 2)) * wide + column + turn * (wide // 2)
