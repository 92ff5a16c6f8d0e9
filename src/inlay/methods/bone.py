"""Bone: what MiSS was called before (Kang and Yin 2024, arXiv 2409.15371). Its files hold the same numbers under other names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..core.config import PeftType
from ..core.method import Method, register
from .miss import Bat, MissConfig


@register
@dataclass
class BoneConfig(MissConfig):
    """`MissConfig` with the names of earlier files.

    Args:
        init_weights: True, ``"bat"``, or False (a random start, for tests).
    """

    peft_type: str | None = PeftType.BONE
    init_weights: bool | str = field(default=True, metadata={"help": "true, bat or false."})

    prefix: ClassVar[str] = "bone_"
    examples: ClassVar[dict[str, dict[str, Any]]] = {"": {"r": 2, "bias": "bone_only"}, "bat": {"r": 2, "init_weights": "bat"}}
    ours: ClassVar[frozenset[str]] = (Method.ours - {"bias"}) | {"miss_dropout", "mini_r"}

    def variant(self) -> Method:
        return self.become(BoneBat) if self.init_weights == "bat" else super().variant()


class BoneBat(Bat):
    """`Bat` with the names of earlier files."""

    prefix: ClassVar[str] = "bone_"
