"""The options with which each method is tested. A method without an entry is tested with small defaults of its own."""

from __future__ import annotations

from typing import Any

import inlay.methods  # noqa: F401  registers them
from inlay.core.method import METHODS, Method

OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "LORA": {
        "": {"r": 4, "lora_alpha": 6},
        "rslora": {"r": 4, "use_rslora": True},
        "dropout": {"r": 4, "lora_dropout": 0.3},
        "lora-bias": {"r": 4, "lora_bias": True},
        "bias-only": {"r": 4, "bias": "lora_only"},
        "bias-all": {"r": 4, "bias": "all"},
        "gaussian": {"r": 2, "init_lora_weights": "gaussian"},
        "orthogonal": {"r": 4, "init_lora_weights": "orthogonal"},
        "dora": {"r": 4, "use_dora": True, "lora_alpha": 6},
        "dora-dropout": {"r": 4, "use_dora": True, "lora_dropout": 0.3},
    },
    "IA3": {"": {"feedforward_modules": []}, "feedforward": {"feedforward_modules": r".*host.*"}},
    "OFT": {
        "": {"oft_block_size": 4},
        "exact": {"oft_block_size": 4, "use_cayley_neumann": False},
        "count": {"r": 2, "oft_block_size": 0, "num_cayley_neumann_terms": 3},
        "ball": {"oft_block_size": 4, "coft": True, "eps": 0.2},
        "shared": {"oft_block_size": 2, "block_share": True, "num_cayley_neumann_terms": 2},
        "dropout": {"oft_block_size": 4, "module_dropout": 0.4, "bias": "oft_only"},
    },
    "HRA": {"": {"r": 4}, "gram-schmidt": {"r": 2, "apply_GS": True}, "odd": {"r": 3, "bias": "hra_only"}},
    "VERA": {"": {"r": 4}, "dropout": {"r": 3, "vera_dropout": 0.3, "projection_prng_key": 7, "save_projection": False}},
    "TRAINABLE_TOKENS": {"": {"token_indices": [0, 4, 7]}},
}


def options_of(name: str) -> dict[str, dict[str, Any]]:
    small = {"r": 4} if getattr(METHODS[name], "r", 0) else {}
    return OPTIONS.get(name, {"": small})


# Every method with every set of options, and every method once.
CASES: dict[str, tuple[type[Method], dict[str, Any]]] = {
    f"{name}-{variant}".rstrip("-"): (METHODS[name], options) for name in METHODS for variant, options in options_of(name).items()
}
METHOD_CASES = [f"{name}-{next(iter(options_of(name)))}".rstrip("-") for name in METHODS]
