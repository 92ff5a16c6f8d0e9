"""ShadowPEFT: the equations, rows of one batch, caches, checkpoints, and what else a method on whole blocks has to do."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import inlay
from inlay.core.inlaid import adapters_of

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 40}
IDS = torch.randint(0, 40, (3, 6), generator=torch.Generator().manual_seed(7))
MASK = torch.tensor([[1] * 6, [0] * 2 + [1] * 4, [0] + [1] * 5])
GREEDY = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(5)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, pad_token_id=0)).eval()


def moved(model: nn.Module, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for q in model.parameters():
        if q.requires_grad:
            q.data += 0.2 * torch.randn(q.shape, generator=generator).to(q.dtype)


def shadowed(base: nn.Module | None = None, **options: object) -> inlay.PeftModel:
    options = {"shadow_alpha": 0.8, "shadow_dropout": 0.0} | options
    model = inlay.get_peft_model(llama() if base is None else base, inlay.ShadowConfig(**options))
    moved(model)
    return model.eval()


def logits(model: nn.Module, **more: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**{"input_ids": IDS, "attention_mask": MASK} | more).logits


def test_the_equations() -> None:
    """Block by block as the paper writes them, with the shadow run apart."""
    model = shadowed()
    found = model(input_ids=IDS)
    base = model.get_base_model()
    ps = adapters_of(base, "default")
    bank = ps[0].shared
    with model.disable_adapter():
        embedded = base.model.embed_tokens(IDS)
        s = bank.shadow_backbone(inputs_embeds=embedded).last_hidden_state
        h, rotary = embedded, base.model.rotary_emb(embedded, torch.arange(6)[None])
        causal = torch.full((6, 6), float("-inf")).triu(1)[None, None]
        for p, block in zip(ps, base.model.layers, strict=True):
            h = h + 0.8 * (h - s) @ p.shadow_down.T @ p.shadow_up.T
            h = block(h, attention_mask=causal, position_embeddings=rotary)
            t = F.gelu(h @ p.shadow_transform_in.T + p.shadow_transform_in_bias) @ p.shadow_transform_out.T + p.shadow_transform_out_bias
            g = F.gelu(h @ p.shadow_gate_in.T + p.shadow_gate_in_bias) @ p.shadow_gate_out.T + p.shadow_gate_out_bias
            s = (1 - g.sigmoid()) * s + g.sigmoid() * t
        expected = base.lm_head(base.model.norm(h))
    torch.testing.assert_close(found.logits, expected)


def test_the_base_at_first_and_afterwards() -> None:
    base = llama()
    before = logits(base)
    model = inlay.get_peft_model(base, inlay.ShadowConfig())
    assert torch.equal(logits(model), before)
    moved(model)
    assert not torch.allclose(logits(model), before, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    with pytest.raises(TypeError, match="another network"):
        model.merge_adapter()
    plain = model.unload()
    assert torch.equal(logits(plain), before)
    assert not plain.model._forward_pre_hooks
    assert not plain.model._forward_hooks


def test_strength() -> None:
    model = shadowed()
    for p in adapters_of(model.get_base_model(), "default"):
        p.strength = 0.0
    torch.testing.assert_close(logits(model), logits(llama()))


def test_values_depend_on_the_seed_alone() -> None:
    def start(seed: int, draws: int) -> Tensor:
        base = llama()
        torch.rand(draws)
        state = torch.get_rng_state()
        model = inlay.get_peft_model(base, inlay.ShadowConfig(seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
        return torch.cat([q.detach().flatten() for q in model.parameters() if q.requires_grad])

    assert torch.equal(start(1, 0), start(1, 5))
    assert not torch.equal(start(1, 0), start(2, 0))


def test_rows_of_one_batch() -> None:
    model = shadowed()
    model.add_adapter("b", inlay.ShadowConfig(shadow_alpha=0.5, target_modules=r"model\.layers\.[12]", shadow_hidden_size=8))
    model.set_adapter("b")
    moved(model, 4)
    alone = {}
    for name in ("default", "b"):
        model.set_adapter(name)
        alone[name] = logits(model)
    with model.use_adapters("default", "b"):
        alone["default", "b"] = logits(model)
    with model.disable_adapter():
        alone["__base__"] = logits(model)
    for rows in (["b", "default", "__base__"], ["default", "b", "default"], ["default", ("default", "b"), "b"]):
        found = model(input_ids=IDS, attention_mask=MASK, adapter_names=rows).logits
        for i, row in enumerate(rows):
            torch.testing.assert_close(found[i], alone[row][i])
    expected = []
    for i, name in enumerate(rows := ["b", "default", "b"]):
        model.set_adapter(name)
        one = {"input_ids": IDS[i : i + 1], "attention_mask": MASK[i : i + 1]}
        expected.append([model.generate(**one, **GREEDY), model.generate(**one, **GREEDY, num_beams=2)])
    for how, options in enumerate(({}, {"num_beams": 2})):
        found = model.generate(input_ids=IDS, attention_mask=MASK, adapter_names=rows, **GREEDY, **options)
        assert torch.equal(found, torch.cat([e[how] for e in expected]))


@torch.no_grad()
def test_a_cache_step_by_step() -> None:
    model = shadowed()
    whole = model(input_ids=IDS).logits
    cache, steps = None, []
    for i in range(0, 6, 2):
        out = model(input_ids=IDS[:, i : i + 2], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole)
    cache.crop(-1)
    again = model(input_ids=IDS[:, -1:], past_key_values=cache, use_cache=True)
    torch.testing.assert_close(again.logits, whole[:, -1:])
    with model.disable_adapter():
        unseen = model(input_ids=IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="has not seen"):
        model(input_ids=IDS[:, -1:], past_key_values=unseen)
    torch.testing.assert_close(model(input_ids=IDS).logits, whole)


def test_assisted_generation() -> None:
    model = shadowed()
    one = {"input_ids": IDS[:1], "attention_mask": MASK[:1]}
    expected = model.generate(**one, **GREEDY)
    assert torch.equal(model.generate(**one, **GREEDY, prompt_lookup_num_tokens=2), expected)
    assert torch.equal(model.generate(**one, **GREEDY, assistant_model=llama()), expected)


def test_hidden_states_and_attentions_are_those_of_the_base() -> None:
    base = llama()
    base.set_attn_implementation("eager")
    model = shadowed(base)
    out = model(input_ids=IDS, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 4
    assert len(out.attentions) == 3
    assert all(type(h) is Tensor for h in out.hidden_states)
    torch.testing.assert_close(out.logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("wrapped", [True, False])
def test_checkpointed_blocks_have_the_same_gradients(wrapped: bool) -> None:
    grads = []
    for checkpointing in (False, True):
        base = llama()
        model = shadowed(base)
        model.train()
        if checkpointing:
            model.enable_input_require_grads()
            base.gradient_checkpointing_enable({"use_reentrant": False})
        (model if wrapped else base)(input_ids=IDS, labels=IDS).loss.backward()
        grads.append({n: q.grad for n, q in model.named_parameters() if q.requires_grad})
    last = "model.layers.2.adapters.default.whole.shadow_"
    for name, grad in grads[0].items():
        # The state behind the last block goes nowhere.
        unused = name.partition("base_model.model.")[2].startswith((f"{last}transform", f"{last}gate"))
        assert (grad is None) == unused, name
        if grad is not None:
            assert grad.abs().sum() > 0, name
            torch.testing.assert_close(grads[1][name], grad)


def test_half_precision() -> None:
    base = llama().bfloat16()
    model = shadowed(base, task_type="CAUSAL_LM")
    assert {q.dtype for q in model.parameters() if q.requires_grad} == {torch.float32}
    out = model.train()(input_ids=IDS, labels=IDS)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert model.base_model.last_shadow_loss.item() > 0
    assert model.eval().generate(input_ids=IDS, **GREEDY).shape == (3, 11)


def test_copies_pickles_and_compiled_models() -> None:
    model = shadowed()
    expected = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        moved(twin)
        changed = logits(twin)
        assert not torch.allclose(changed, expected, atol=1e-3)
        assert torch.equal(logits(model), expected)
        assert torch.equal(logits(twin.unload()), logits(llama()))
    torch.testing.assert_close(logits(torch.compile(model, backend="eager")), expected)


def test_adapters_come_and_go(tmp_path: Path) -> None:
    model = shadowed()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    model.add_adapter("b", inlay.ShadowConfig(r=3))
    assert torch.equal(logits(model), expected)
    model.delete_adapter("default")
    assert torch.equal(logits(model), logits(llama()))
    assert len(model.get_base_model().model._forward_pre_hooks) == 1
    model.load_adapter(str(tmp_path), "again")
    model.set_adapter("again")
    assert torch.equal(logits(model), expected)


def test_over_other_methods() -> None:
    model = shadowed()
    model.add_adapter("low", inlay.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    with model.use_adapters("low", "default"):
        both = logits(model)
    model.base_model.merge_adapter(["low"])
    with model.use_adapters("low", "default"):
        torch.testing.assert_close(logits(model), both)


def test_an_encoder() -> None:
    torch.manual_seed(5)
    base = BertModel(BertConfig(**SIZES)).eval()
    before = base(IDS, attention_mask=MASK).last_hidden_state
    model = inlay.get_peft_model(base, inlay.ShadowConfig(shadow_alpha=0.8))
    assert len(adapters_of(base, "default")) == 3
    torch.testing.assert_close(model.eval()(IDS, attention_mask=MASK).last_hidden_state, before)
    moved(model)
    found = model(IDS, attention_mask=MASK).last_hidden_state
    assert not torch.allclose(found, before, atol=1e-3)
    torch.testing.assert_close(model(IDS[1:2, 2:], attention_mask=MASK[1:2, 2:]).last_hidden_state.shape, torch.Size((1, 4, 16)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        return encoder_hidden_states, hidden_states + torch.tanh(self.inside(hidden_states))


class Diffusion(nn.Module):
    """As a transformer of images: its blocks see latents, and hand a text on beside them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.config = type("Config", (), {"num_attention_heads": 2, "attention_head_dim": 4})()
        self.x_embedder = nn.Linear(3, 8)
        self.transformer_blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, hidden_states: Tensor, text: Tensor) -> Tensor:
        x = self.x_embedder(hidden_states)
        for block in self.transformer_blocks:
            text, x = block(hidden_states=x, encoder_hidden_states=text)
        return x


def test_blocks_that_read_no_tokens() -> None:
    x, text = torch.randn(4, 5, 3), torch.randn(4, 2, 8)
    before = Diffusion()(x, text)
    model = inlay.get_peft_model(Diffusion(), inlay.ShadowConfig(shadow_hidden_size=6, shadow_dropout=0.0, shadow_alpha=0.9))
    assert torch.equal(model(x, text), before)
    moved(model)
    alone = model(x, text)
    assert not torch.allclose(alone, before, atol=1e-3)
    mixed = model(x, text, adapter_names=["__base__", "default", "__base__", "default"])
    torch.testing.assert_close(mixed[[0, 2]], before[[0, 2]])
    torch.testing.assert_close(mixed[[1, 3]], alone[[1, 3]])
    alone.sum().backward()
    assert adapters_of(model.get_base_model(), "default")[0].shared.shadow_backbone.proj_in.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="hidden state at a time"):
        model.base_model.unload_shadow()


def test_blocks_that_are_sequences() -> None:
    base = Diffusion()
    base.transformer_blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
    base.forward = lambda x: base.transformer_blocks[1](base.transformer_blocks[0](base.x_embedder(x)))  # type: ignore[method-assign]
    x = torch.randn(4, 5, 3)
    before = base(x)
    model = inlay.get_peft_model(base, inlay.ShadowConfig(shadow_dropout=0.0, shadow_alpha=0.9))
    assert torch.equal(model(x), before)
    moved(model)
    assert not torch.allclose(model(x), before, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r=0: give a positive number"),
        ({"shadow_dropout": 1.0}, "share in"),
        ({"shadow_model": "somewhere", "shadow_hidden_size": 4}, "shadow_hidden_size: a trained shadow has sizes of its own"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inlay.ShadowConfig(**options)


def test_bad_bases() -> None:
    with pytest.raises(ValueError, match="No list of blocks"):
        inlay.get_peft_model(nn.Sequential(nn.Linear(4, 4)), inlay.ShadowConfig())
    base = llama()
    with pytest.raises(ValueError, match="nothing"):
        inlay.get_peft_model(base, inlay.ShadowConfig(target_modules=["blocks"]))
    assert not base.model._forward_hooks
    model = shadowed(share_embeddings=False, shadow_hidden_size=8)
    with pytest.raises(ValueError, match="give `input_ids`"):
        model(inputs_embeds=torch.randn(1, 3, 16))
    assert model(input_ids=IDS).logits.shape == (3, 6, 40)
