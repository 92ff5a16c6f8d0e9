"""The memory of a training step, before there is a model: each operation of the step on stand-ins, each tensor booked."""

from __future__ import annotations

from .optimizers import OPTIMIZERS
from .remedies import Remedy, remedies
from .step import DTYPES, MemoryPlan, Setting, plan

__all__ = ["DTYPES", "OPTIMIZERS", "MemoryPlan", "Remedy", "Setting", "plan", "remedies"]
