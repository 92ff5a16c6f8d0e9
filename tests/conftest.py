"""No network, no noise, one thread a worker: the workers share the cores."""

import os
from importlib.util import find_spec

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Where lines are wrapped does not depend on how long the path of a temporary folder is.
os.environ["COLUMNS"] = "240"

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything loads Triton: its kernels are then run by its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)
# Triton is there for Linux on x86-64 alone.
collect_ignore_glob = [] if find_spec("triton") else ["kernels/*triton*"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
