"""The tiny model for the tests of training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from tiny_chat_model import make_model, make_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tokenizer: Any) -> Any:
    return make_model(len(tokenizer))


@pytest.fixture(scope="session")
def talkative_model(tokenizer: Any) -> Any:
    return make_model(len(tokenizer), tied=False)
