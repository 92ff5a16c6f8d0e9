"""ShadowPEFT against HF peft: files both ways, logits, losses, generations, training steps."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaModel

import inlay

from .models import MODELS, SIZES, reals, seeded, tokens
from .support import WEIGHTS, both_ways, close, jitter, same_steps

NARROW = {"shadow_hidden_size": 8, "shadow_intermediate_size": 12, "shadow_num_attention_heads": 1}
OPTIONS = {
    "plain": {},
    "narrow": NARROW,
    "deep": {"shadow_num_hidden_layers": 3, "r": 3, "update_hidden_size": 5, "shadow_alpha": 0.7},
    "own-embeddings": {"share_embeddings": False},
    "some-blocks": {"target_modules": r"model\.layers\.1"},
    "random": {"init_weights": False},
}
GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}


def sequence():
    return LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3, pad_token_id=0))


class Sizes(dict):
    """As configurations of diffusers are: a dictionary whose entries are attributes."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Latents(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = nn.Linear(8, 8)

    def forward(self, hidden_states):
        return hidden_states + torch.tanh(self.inside(hidden_states))


class Diffusion(nn.Module):
    """As a transformer of images: its blocks see latents and no tokens."""

    def __init__(self):
        super().__init__()
        self.config = Sizes(num_attention_heads=2, attention_head_dim=4)
        self.x_embedder = nn.Linear(3, 8)
        self.transformer_blocks = nn.ModuleList(Latents() for _ in range(3))

    def forward(self, x):
        x = self.x_embedder(x)
        for block in self.transformer_blocks:
            x = block(x)
        return x


def flux():
    from diffusers import Flux2Transformer2DModel

    sizes = {"in_channels": 4, "num_layers": 2, "num_single_layers": 4, "attention_head_dim": 8, "num_attention_heads": 2}
    return Flux2Transformer2DModel(**sizes, joint_attention_dim=6, timestep_guidance_channels=8, mlp_ratio=2.0, axes_dims_rope=(2,) * 4)


def latents_and_text():
    made = torch.Generator().manual_seed(4)
    x, text = torch.randn(2, 5, 4, generator=made), torch.randn(2, 3, 6, generator=made)
    places = {"img_ids": torch.arange(20.0).reshape(5, 4), "txt_ids": torch.zeros(3, 4)}
    times = {"timestep": torch.tensor([0.3, 0.8]), "guidance": torch.tensor([1.0, 2.0])}
    return {"hidden_states": x, "encoder_hidden_states": text, **places, **times, "return_dict": False}


MODELS["flux"] = (seeded(flux), latents_and_text)
MODELS["diffusion"] = (seeded(Diffusion), reals(2, 5, 3))
MODELS["llama-sequence"] = (seeded(sequence), tokens)


def pair(folder, name="llama", trainable=False, **options):
    """The real library's model and ours, of one file."""
    build, _ = MODELS[name]
    theirs = peft.get_peft_model(build(), peft.ShadowConfig(shadow_dropout=0.0, shadow_alpha=0.8, **options))
    jitter(theirs)
    theirs.save_pretrained(folder)
    return theirs, inlay.PeftModel.from_pretrained(build(), folder, is_trainable=trainable)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_llama(tmp_path: Path, options: dict) -> None:
    both_ways("llama", "ShadowConfig", tmp_path, **{"shadow_alpha": 0.8, **options})


def test_gpt2_of_another_width(tmp_path: Path) -> None:
    both_ways("gpt2", "ShadowConfig", tmp_path, shadow_alpha=0.8, shadow_hidden_size=8)


def test_gpt2_reads_the_embeddings_of_its_base(tmp_path: Path) -> None:
    # HF keeps, trains and saves a second table of embeddings that nothing reads.
    both_ways("gpt2", "ShadowConfig", tmp_path, exact_files=False, same_count=False, shadow_alpha=0.8)
    mine, its = (set(load_file(tmp_path / folder / WEIGHTS)) for folder in ("ours", "theirs"))
    assert its - mine == {"base_model.shadow_backbone.default.wte.weight"}
    assert mine < its


def test_mixtral(tmp_path: Path) -> None:
    both_ways("mixtral", "ShadowConfig", tmp_path, shadow_alpha=0.8)


def test_latents_of_images(tmp_path: Path) -> None:
    options = {"shadow_alpha": 0.8, "shadow_hidden_size": 6, "shadow_num_hidden_layers": 2, "shadow_intermediate_size": 5}
    both_ways("diffusion", "ShadowConfig", tmp_path / "files", **options)
    same_steps("diffusion", "ShadowConfig", tmp_path / "steps", **options, shadow_dropout=0.0)


FLUX = {
    "plain": {},
    "narrow": {"shadow_num_attention_heads": 1, "shadow_intermediate_size": 12},
    "deep": {"shadow_num_hidden_layers": 2},
    "own-stems": {"share_embeddings": False},
}


@pytest.mark.parametrize("options", FLUX.values(), ids=FLUX)
def test_flux(tmp_path: Path, options: dict) -> None:
    both_ways("flux", "ShadowConfig", tmp_path / "files", shadow_alpha=0.8, **options)
    same_steps("flux", "ShadowConfig", tmp_path / "steps", shadow_alpha=0.8, shadow_dropout=0.0, **options)
    build, _ = MODELS["flux"]
    kept = []
    for library in (peft, inlay):
        library.get_peft_model(build(), library.ShadowConfig(**options)).save_pretrained(tmp_path / library.__name__)
        tensors = load_file(tmp_path / library.__name__ / WEIGHTS)
        start = ("shadow_backbone", "shadow_projection")
        kept.append({k: t for k, t in tensors.items() if k.removeprefix("base_model.").startswith(start)})
    assert kept[0].keys() == kept[1].keys()
    # HF cuts the two matrices in `ff.linear_in` of a narrower shadow across their border: it looks for a dot before the name.
    crossed = {k for k in kept[0] if k.endswith(("ff.linear_in.weight", "ff_context.linear_in.weight"))}
    known = crossed if "shadow_intermediate_size" in options else set()
    assert {k for k in kept[0] if not torch.equal(kept[0][k], kept[1][k])} == known


@pytest.mark.parametrize("options", [{}, NARROW], ids=["plain", "narrow"])
def test_five_steps(tmp_path: Path, options: dict) -> None:
    same_steps("llama", "ShadowConfig", tmp_path, shadow_dropout=0.0, shadow_alpha=0.8, **options)


@pytest.mark.parametrize(("name", "task"), [("llama", "CAUSAL_LM"), ("llama-sequence", "SEQ_CLS")])
def test_the_loss_of_what_the_shadow_predicts_alone(tmp_path: Path, name: str, task: str) -> None:
    theirs, ours = pair(tmp_path, name, True, task_type=task, auxiliary_loss_weight=0.5)
    inputs = tokens()
    inputs["labels"] = inputs["input_ids"] if task == "CAUSAL_LM" else torch.tensor([0, 2, 1])
    inputs["attention_mask"] = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0]])
    losses = []
    for model in (theirs, ours):
        model.train()
        optimizer = torch.optim.SGD([q for q in model.parameters() if q.requires_grad], lr=0.05)
        losses.append([])
        for _ in range(5):
            loss = model(**inputs).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert ours.base_model.last_shadow_loss.item() == pytest.approx(theirs.base_model.last_shadow_loss.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generations(tmp_path: Path, name: str, how: dict) -> None:
    theirs, ours = pair(tmp_path, name)
    inputs = tokens() | {"attention_mask": torch.tensor([[1] * 6, [0] * 2 + [1] * 4, [0] + [1] * 5])}
    expected = theirs.generate(**inputs, **GREEDY, **how)
    assert torch.equal(ours.generate(**inputs, **GREEDY, **how), expected)
    assert torch.equal(ours.generate(**inputs, **GREEDY, **how, use_cache=False), expected)
    assert torch.equal(ours.generate(**inputs, **GREEDY, **how, cache_implementation="static"), expected)
    assert not torch.equal(MODELS[name][0]().generate(**inputs, **GREEDY, **how), expected)


def test_the_shadow_alone(tmp_path: Path) -> None:
    theirs, ours = pair(tmp_path, task_type="CAUSAL_LM")
    its, mine = theirs.base_model.unload_shadow(copy=True), ours.base_model.unload_shadow(copy=True)
    close(mine(**tokens()).logits, its(**tokens()).logits)
    assert torch.equal(mine.generate(**tokens(), **GREEDY), its.generate(**tokens(), **GREEDY))
    close(ours.base_model.unload_shadow()(**tokens()).logits, mine(**tokens()).logits)


def trained_shadow(folder: Path, projected: bool) -> None:
    torch.manual_seed(1)
    config = LlamaConfig(**SIZES | {"hidden_size": 8})
    model = LlamaModel(config)
    if not projected:
        config.hidden_size = 16
        LlamaModel(LlamaConfig(**SIZES)).save_pretrained(folder)
        return
    import json

    folder.mkdir()
    tensors = {f"shadow_model.{k}": v for k, v in model.state_dict().items()}
    save_file(tensors | {"shadow_hidden_projection.weight": torch.randn(16, 8)}, folder / "model.safetensors")
    plain = {"model_type": "causal_lm_with_hidden_projection", "shadow_model_config": config.to_dict()}
    (folder / "config.json").write_text(json.dumps(plain))


@pytest.mark.parametrize("projected", [False, True])
def test_a_trained_shadow(tmp_path: Path, projected: bool) -> None:
    trained_shadow(tmp_path / "shadow", projected)
    options = {"shadow_model": str(tmp_path / "shadow"), "shadow_alpha": 0.8, "shadow_dropout": 0.0}
    both_ways("llama", "ShadowConfig", tmp_path, **options)
    same_steps("llama", "ShadowConfig", tmp_path / "steps", **options)


def test_a_trained_flux(tmp_path: Path) -> None:
    from diffusers import Flux2Transformer2DModel

    small = dict(MODELS["flux"][0]().config) | {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 1}
    seeded(lambda: Flux2Transformer2DModel.from_config(small))().save_pretrained(tmp_path / "shadow")
    options = {"shadow_model": str(tmp_path / "shadow"), "shadow_alpha": 0.8}
    both_ways("flux", "ShadowConfig", tmp_path / "files", **options)


def test_rows_of_a_flux() -> None:
    build, example = MODELS["flux"]
    model = inlay.get_peft_model(build(), inlay.ShadowConfig(shadow_alpha=0.8, shadow_dropout=0.0)).eval()
    jitter(model)
    alone, before = model(**example())[0], build()(**example())[0]
    mixed = model(**example(), adapter_names=["__base__", "default"])[0]
    close(mixed, torch.stack([before[0], alone[1]]))
