"""The tiny model for the tests of training."""

from __future__ import annotations

from typing import Any

import pytest

from ..tiny_chat_model import make_model, make_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tokenizer: Any) -> Any:
    return make_model(len(tokenizer))


@pytest.fixture(scope="session")
def talkative_model(tokenizer: Any) -> Any:
    return make_model(len(tokenizer), tied=False)
