"""The ``README.md`` of an adapter's folder: what hubs and people read about it. Never touches the network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..core.config import PEFT_VERSION, PeftConfig
from ..core.targets import bare_model
from .folder import CARD_NAME, Staged

_TEXT = """
# {title}

An adapter ({method}) for `{base}`.

```python
from inlay import AutoPeftModel

model = AutoPeftModel.from_pretrained("path/to/this/folder")
```

{origin}### Framework versions

- PEFT {version}
"""


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def write_card(folder: Path, model: nn.Module | None, config: PeftConfig, origin: str = "", tags: Iterable[str] = ()) -> None:
    """Write the card of an adapter, or bring the metadata of an existing one up to date.

    Args:
        folder: the adapter's folder; made where absent.
        model: the model that has the adapter, where there is one.
        config: the adapter's configuration.
        origin: what it was made of, where it was not trained: paragraphs of Markdown for a new card.
        tags: of it, beside those that follow from the model and the method.
    """
    from huggingface_hub import ModelCard

    path = folder / CARD_NAME
    base_model: Any = None if model is None else bare_model(model)
    name = config.base_model_name_or_path or getattr(base_model, "name_or_path", None)
    if path.exists():
        card = ModelCard.load(path)
    else:
        origin = f"### How it was made\n\n{origin.strip()}\n\n" if origin else ""
        known = {"method": config.peft_type, "base": name or "a base of its own", "version": PEFT_VERSION, "origin": origin}
        text = _TEXT.format(title=folder.name or "Adapter", **known)
        card = ModelCard(f"---\nlibrary_name: peft\n---\n{text}", ignore_metadata_errors=True)
    data: Any = card.data
    tags = {*tags, *(data.tags or ()), *(getattr(base_model, "model_tags", None) or ())}
    if hasattr(base_model, "config"):
        tags.add("transformers")
    if config.peft_type == "LORA":
        tags.add("lora")
    if name:
        data.base_model = name
        tags.add(f"base_model:adapter:{name}")
    data["library_name"] = "peft"
    data.tags = sorted(tags)
    if config.task_type == "CAUSAL_LM" and not data.pipeline_tag:
        data.pipeline_tag = "text-generation"
    with Staged(folder) as staged:
        staged.write(CARD_NAME, lambda p: p.write_text(str(card), encoding="utf-8"))
