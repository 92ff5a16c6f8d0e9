"""LoRA that was trained on experts one by one, and configurations that name them so, on models that keep experts in stacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import inlay

WIDTH, INNER, EXPERTS, LAYERS, R, ALPHA = 16, 12, 3, 2, 2, 6
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 2,
    "vocab_size": 30,
}  # fmt: skip
IDS = torch.arange(12).view(2, 6)


def model(kind: str) -> PreTrainedModel:
    torch.manual_seed(3)
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=EXPERTS)).eval()
    more = {"moe_intermediate_size": INNER, "num_experts": EXPERTS, "num_experts_per_tok": 2}
    if kind == "qwen3":
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **more, head_dim=8)).eval()
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, **more, shared_expert_intermediate_size=INNER)).eval()


def logits(m: Any) -> Tensor:
    with torch.no_grad():
        return m(input_ids=IDS).logits


NAMES = {"mixtral": ("block_sparse_moe", "w1", "w3", "w2"), "qwen3": ("mlp", "gate_proj", "up_proj", "down_proj")}


def old_file(folder: Path, kind: str, router: bool = True, **options: Any) -> dict[str, Tensor]:
    """A file as HF peft wrote it with transformers 4: a pair of factors for each matrix of each expert."""
    host, *halves = NAMES[kind]
    generator, tensors = torch.Generator().manual_seed(5), {}
    sizes = {halves[0]: (WIDTH, INNER), halves[1]: (WIDTH, INNER), halves[2]: (INNER, WIDTH)}
    for layer in range(LAYERS):
        prefix = f"base_model.model.model.layers.{layer}"
        pairs = {f"{host}.experts.{e}.{half}": sizes[half] for e in range(EXPERTS) for half in halves}
        pairs |= {"self_attn.q_proj": (WIDTH, WIDTH)} | ({f"{host}.gate": (WIDTH, EXPERTS)} if router else {})
        for path, (inp, out) in pairs.items():
            tensors[f"{prefix}.{path}.lora_A.weight"] = torch.randn(R, inp, generator=generator) * 0.3
            tensors[f"{prefix}.{path}.lora_B.weight"] = torch.randn(out, R, generator=generator) * 0.3
    targets = ["q_proj", *halves, *(["gate"] if router else [])]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": R, "lora_alpha": ALPHA, "target_modules": targets}
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config | options))
    save_file(tensors, folder / "adapter_model.safetensors")
    return tensors


def by_hand(kind: str, tensors: dict[str, Tensor], scale: float) -> PreTrainedModel:
    """The model with ``W + s B A`` in each expert's own rows of the stacks."""
    m = model(kind)
    host, *halves = NAMES[kind]
    for layer, block in enumerate(m.model.layers):

        def update(path: str, layer: int = layer) -> Tensor:
            key = f"base_model.model.model.layers.{layer}.{path}"
            return scale * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]

        with torch.no_grad():
            block.self_attn.q_proj.weight += update("self_attn.q_proj")
            if any(".gate." in key for key in tensors):
                block.mlp.gate.weight += update(f"{host}.gate")
            for e in range(EXPERTS):
                parts = [update(f"{host}.experts.{e}.{half}") for half in halves]
                block.mlp.experts.gate_up_proj[e] += torch.cat(parts[:2])
                block.mlp.experts.down_proj[e] += parts[2]
    return m


@pytest.mark.parametrize("kind", NAMES)
def test_a_file_of_single_experts(kind: str, tmp_path: Path) -> None:
    expected = logits(by_hand(kind, old_file(tmp_path / "old", kind), ALPHA / R))
    ours = inlay.PeftModel.from_pretrained(model(kind), str(tmp_path / "old"))
    torch.testing.assert_close(logits(ours), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(model(kind), str(tmp_path / "old"))), expected, atol=1e-5, rtol=1e-5)
    ours.save_pretrained(tmp_path / "new")
    for library in (peft, inlay):
        again = library.PeftModel.from_pretrained(model(kind), str(tmp_path / "new"))
        torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(ours.unload()), logits(model(kind)))


def test_the_scaling_of_both_halves_stays_with_rslora(tmp_path: Path) -> None:
    """HF peft doubles alpha where the rank doubles, which is right without rsLoRA alone."""
    tensors = old_file(tmp_path, "mixtral", use_rslora=True)
    ours = inlay.PeftModel.from_pretrained(model("mixtral"), str(tmp_path))
    torch.testing.assert_close(logits(ours), logits(by_hand("mixtral", tensors, ALPHA / R**0.5)), atol=1e-5, rtol=1e-5)


def test_ranks_by_the_names_of_old(tmp_path: Path) -> None:
    """The same ranks, said by patterns that name what is no module any more."""
    patterns = {"r": 7, "rank_pattern": {"w1": R, "w3": R, "w2": R, "q_proj": R}, "lora_alpha": 21}
    alphas = {"alpha_pattern": {"w1": ALPHA, "w3": ALPHA, "w2": ALPHA, "q_proj": ALPHA}}
    tensors = old_file(tmp_path, "mixtral", router=False, **patterns, **alphas)
    ours = inlay.PeftModel.from_pretrained(model("mixtral"), str(tmp_path))
    torch.testing.assert_close(logits(ours), logits(by_hand("mixtral", tensors, ALPHA / R)), atol=1e-5, rtol=1e-5)


def test_parts_of_different_ranks_are_refused(tmp_path: Path) -> None:
    config = inlay.LoraConfig(r=2, target_modules=["w1", "w2", "w3"], rank_pattern={"w1": 4})
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj different ranks"):
        inlay.get_peft_model(model("mixtral"), config)


def test_half_of_a_stack_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'w1' and 'w3' are halves of model\.layers\.0\.mlp\.experts\.gate_up_proj"):
        inlay.get_peft_model(model("mixtral"), inlay.LoraConfig(target_modules=["w1", "w2"]))


def test_a_file_that_lacks_an_expert(tmp_path: Path) -> None:
    tensors = old_file(tmp_path, "mixtral")
    gone = "base_model.model.model.layers.1.block_sparse_moe.experts.2.w3.lora_A.weight"
    save_file({k: t for k, t in tensors.items() if k != gone}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"lora_A for some of the experts .* none for .*experts\.2\.w3"):
        inlay.PeftModel.from_pretrained(model("mixtral"), str(tmp_path))


TARGETS: dict[str, tuple[str, Any]] = {
    "everything": ("mixtral", "all-linear"),
    "names": ("mixtral", ["q_proj", "w1", "w2", "w3"]),
    "router": ("mixtral", ["gate"]),
    "pattern": ("mixtral", r".*\.(w1|w2|w3|gate)"),
    "everything-qwen3": ("qwen3", "all-linear"),
    "names-qwen3": ("qwen3", ["gate_proj", "up_proj", "down_proj"]),
}


@pytest.mark.parametrize("case", TARGETS)
def test_the_same_weights_as_hf_and_files_both_ways(case: str, tmp_path: Path) -> None:
    kind, targets = TARGETS[case]
    found = {}
    for library in (peft, inlay):
        m = library.get_peft_model(model(kind), library.LoraConfig(r=2, target_modules=targets))
        torch.manual_seed(1)
        for q in m.parameters():
            if q.requires_grad:
                q.data.normal_(std=0.2)
        found[library] = logits(m), sum(q.numel() for q in m.parameters() if q.requires_grad)
        m.save_pretrained(tmp_path / library.__name__)
    assert found[peft][1] == found[inlay][1]
    for writer, reader in ((peft, inlay), (inlay, peft)):
        again = reader.PeftModel.from_pretrained(model(kind), str(tmp_path / writer.__name__))
        torch.testing.assert_close(logits(again), found[writer][0], atol=1e-5, rtol=1e-5)


def test_shared_experts_are_modules_still(tmp_path: Path) -> None:
    """HF peft leaves them out: it takes a name that became a parameter for nothing else."""
    config = inlay.LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"])
    found = inlay.explain_targets(model("qwen2"), config).matched
    assert "model.layers.0.mlp.shared_expert.up_proj" in found
    assert "model.layers.0.mlp.experts.gate_up_proj" in found


def test_layers_that_are_left_out() -> None:
    config = inlay.LoraConfig(r=2, target_modules=["w1", "w2", "w3"], layers_to_transform=[1])
    found = inlay.explain_targets(model("mixtral"), config).matched
    assert found == ["model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"]
