"""HF's questions whether other packages are there, answered without importing them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec


def _asks_for(package: str) -> Callable[..., bool]:
    @cache
    def is_available() -> bool:
        return find_spec(package) is not None

    is_available.__doc__ = f"Whether {package} is installed."
    return is_available


is_aqlm_available = _asks_for("aqlm")
is_bnb_available = _asks_for("bitsandbytes")
is_bnb_4bit_available = is_bnb_available
is_diffusers_available = _asks_for("diffusers")
is_eetq_available = _asks_for("eetq")
is_gptqmodel_available = _asks_for("gptqmodel")
is_hqq_available = _asks_for("hqq")
is_inc_available = _asks_for("neural_compressor")
is_optimum_available = _asks_for("optimum")
is_te_available = _asks_for("transformer_engine")
is_torchao_available = _asks_for("torchao")


def is_xpu_available(check_device: bool = False) -> bool:
    """Whether torch sees an Intel GPU."""
    import torch

    return hasattr(torch, "xpu") and torch.xpu.is_available()
