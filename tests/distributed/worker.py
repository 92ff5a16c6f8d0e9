"""What each process of the distributed tests does. Started by torch's launcher with the name of a scenario and a folder."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import inlay


def model() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def adapted(dropout: float = 0.0) -> nn.Module:
    config = inlay.LoraConfig(r=4, target_modules=["0", "2"], modules_to_save=["4"], init_lora_weights=False, lora_dropout=dropout)
    return inlay.get_peft_model(model(), config)


def quantised(backend: str) -> nn.Module:
    """LoRA on layers in 4 bits: of bitsandbytes, stored as if they were numbers in half precision, or of Inlay."""
    torch.manual_seed(7)
    base = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64)).to(torch.bfloat16)
    if backend == "inlay":
        inlay.quantize_(base)
    else:
        from bitsandbytes.nn import Linear4bit, Params4bit

        for i in (0, 2, 4):
            dense, options = base[i], {"quant_type": "nf4", "quant_storage": torch.bfloat16}
            layer = Linear4bit(dense.in_features, dense.out_features, compute_dtype=torch.bfloat16, **options)
            layer.weight = Params4bit(dense.weight.data, requires_grad=False, module=layer, **options)
            layer.bias = dense.bias
            base[i] = layer.to("cpu")
    config = inlay.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False, seed=3)
    return inlay.get_peft_model(base, config)


def wide_batch(rank: int) -> torch.Tensor:
    return torch.randn(6, 64, generator=torch.Generator().manual_seed(rank)).to(torch.bfloat16)


def three_steps(adapted_model: nn.Module, ranks: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The adapter after three steps on the batches of these ranks."""
    trained = {n: q for n, q in adapted_model.named_parameters() if q.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for step in range(3):
        losses = [adapted_model(wide_batch(10 * step + rank)).float().square().mean() for rank in ranks]
        (sum(losses) / len(losses)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n: (q.full_tensor() if hasattr(q, "full_tensor") else q).detach() for n, q in trained.items()}


def batch(rank: int) -> torch.Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(rank))


def gradients(adapted_model: nn.Module) -> dict[str, torch.Tensor]:
    return {n.removeprefix("module."): q.grad.clone() for n, q in adapted_model.named_parameters() if q.grad is not None}


def ddp(folder: Path, rank: int) -> None:
    from torch.nn.parallel import DistributedDataParallel

    wrapped = DistributedDataParallel(adapted())
    wrapped(batch(rank)).square().mean().backward()
    if rank == 0:
        torch.save(gradients(wrapped), folder / "gradients.pt")
        wrapped.module.save_pretrained(folder / "adapter")


def fsdp2(folder: Path, rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    wrapped = adapted()
    base = wrapped.get_base_model()
    for i in (0, 2, 4):
        fully_shard(base[i])
    fully_shard(base)
    wrapped(batch(rank)).square().mean().backward()
    found = {n: q.grad.full_tensor() for n, q in wrapped.named_parameters() if q.grad is not None}
    tensors = inlay.get_peft_model_state_dict(wrapped)
    wrapped.save_pretrained(folder / "adapter", is_main_process=rank == 0)
    if rank == 0:
        torch.save(found, folder / "gradients.pt")
        assert all(type(t) is not nn.Parameter or t.device.type == "cpu" for t in tensors.values())


def fsdp2_quantised(folder: Path, rank: int, backend: str) -> None:
    from torch.distributed.fsdp import fully_shard

    wrapped = quantised(backend)
    base = wrapped.get_base_model()
    # Sharding would make the tensors of Inlay dense: each process keeps all their codes.
    whole = {q for q in base.parameters() if backend == "inlay" and not q.requires_grad}
    for i in (0, 2, 4):
        fully_shard(base[i], ignored_params=whole)
    fully_shard(base, ignored_params=whole)
    sizes = {i: getattr(base[i].weight, "_local_tensor", base[i].weight).shape for i in (0, 2, 4)}
    found = three_steps(wrapped, (rank,))
    wrapped.save_pretrained(folder / "adapter", is_main_process=rank == 0)
    if rank == 0:
        torch.save({"trained": found, "sizes": sizes, "kind": type(base[0].weight).__name__}, folder / "found.pt")


SPLIT: dict[str, dict[str, Any]] = {
    "LORA": {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "modules_to_save": ["lm_head"], "bias": "all"},
    "LORA-dora": {"r": 4, "target_modules": ["q_proj", "o_proj", "down_proj"], "init_lora_weights": False, "use_dora": True},
    "LORA-embedding": {"r": 4, "target_modules": ["embed_tokens", "k_proj"], "init_lora_weights": False},
    "IA3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"], "init_ia3_weights": False},
    "OFT": {"oft_block_size": 4, "target_modules": "all-linear", "init_weights": False},
    "VERA": {"r": 8, "target_modules": "all-linear", "init_weights": False},
    "LN_TUNING": {"target_modules": ["norm", "input_layernorm"]},
}


def llama(folder: Path) -> Path:
    """A Llama on disk, with biases, whose heads can be split between two devices."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(7)
    made = LlamaForCausalLM(LlamaConfig(vocab_size=64, attention_bias=True, mlp_bias=True, **sizes))
    for name, q in made.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(q, std=0.1)
    made.save_pretrained(folder / "base")
    return folder / "base"


def used(base: Any, case: str, folder: Path) -> dict[str, torch.Tensor]:
    """What an adapter does, learns, writes and merges to on a model."""
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        plain = base(ids).logits
    config = inlay.get_peft_config({"peft_type": case.partition("-")[0], "task_type": "CAUSAL_LM", **SPLIT[case]})
    tuned: Any = inlay.get_peft_model(base, config)
    output = tuned(input_ids=ids, labels=ids)
    output.loss.backward()
    found = {f"gradient of {n}": q.grad.clone() for n, q in tuned.named_parameters() if q.grad is not None}
    found["logits"] = output.logits.detach()
    with torch.no_grad():
        found["without gradients"] = tuned(input_ids=ids).logits
        found["of rows"] = tuned(input_ids=ids, adapter_names=["default", "__base__"]).logits
        found["generated"] = tuned.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        tuned.merge_adapter()
        found["merged"] = tuned(input_ids=ids).logits
        tuned.unmerge_adapter()
        with tuned.disable_adapter():
            torch.testing.assert_close(tuned(input_ids=ids).logits, plain)
    tuned.save_pretrained(folder, is_main_process=int(os.environ.get("RANK", 0)) == 0)
    with torch.no_grad():
        assert torch.equal(tuned.unload()(ids).logits, plain)
    return found


def split(folder: Path, rank: int) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    for case in SPLIT:
        base = AutoModelForCausalLM.from_pretrained(folder / "base", distributed_config=DistributedConfig(tp_size=2))
        assert base.model.layers[0].self_attn.q_proj.weight.to_local().shape == (16, 32)
        torch.save(used(base, case, folder / case), folder / f"{case} on {rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    name, _, backend = sys.argv[1].partition(" ")
    scenario = {"ddp": ddp, "fsdp2": fsdp2, "quantised": fsdp2_quantised, "split": split}[name]
    scenario(Path(sys.argv[2]), int(os.environ["RANK"]), *([backend] if backend else []))
    dist.barrier()
    dist.destroy_process_group()
