"""Optimisers that know of factors: each treats the two factors of a low-rank update differently.

They ask an adapter for its factors, and so work for any method whose update is ``s B A`` with A and B trained as they are.
"""

from .lorafa import LoraFAOptimizer, create_lorafa_optimizer
from .loraplus import create_loraplus_optimizer
from .riemannian import create_riemannian_optimizer

__all__ = ["LoraFAOptimizer", "create_lorafa_optimizer", "create_loraplus_optimizer", "create_riemannian_optimizer"]
