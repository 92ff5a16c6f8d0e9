"""diffusers: LoRA on a UNet and through a pipeline, loaded, weighted, fused, hot-swapped, deleted, unloaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lokr.layer import factorization
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from .tiny import values

TARGETS = ["to_q", "to_v", "to_out.0", "conv1", "proj_in"]


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2,
    ).eval()  # fmt: skip


def pipeline() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, projection_dim=16,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    return StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text).eval(), tokenizer=None, unet=unet(), scheduler=DDIMScheduler(),  # type: ignore[arg-type]
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@torch.no_grad()
def picture(model: UNet2DConditionModel, **options: Any) -> list[float]:
    generator = torch.Generator().manual_seed(5)
    noise, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 3, 16, generator=generator)
    return model(noise, 7, text, **options).sample.flatten()[:24].tolist()


@torch.no_grad()
def words(model: CLIPTextModel) -> list[float]:
    return model(torch.arange(3, 11)[None]).last_hidden_state.flatten()[-24:].tolist()


def tensors(model: Any, rank: int, seed: int, **options: Any) -> dict[str, Tensor]:
    """The tensors of a LoRA for a model, by their keys in a file."""
    model.add_adapter(LoraConfig(r=rank, **({"target_modules": TARGETS} | options)), "made")
    return values(get_peft_model_state_dict(model, adapter_name="made"), seed)


def near(a: list[float], b: list[float]) -> bool:
    return torch.allclose(torch.tensor(a), torch.tensor(b), atol=1e-5)


def models(folder: Path) -> dict[str, Any]:
    model = unet()
    base = picture(model)
    first, second = tensors(unet(), 4, 1), tensors(unet(), 4, 2)
    model.load_lora_adapter(dict(first), prefix=None, adapter_name="a")
    result: dict[str, Any] = {"a": picture(model)}
    result["scaled by a call"] = picture(model, cross_attention_kwargs={"scale": 0.5})
    assert near(picture(model), result["a"])
    model.load_lora_adapter(dict(second), prefix=None, adapter_name="b")
    result["b is there"] = picture(model)
    model.set_adapters(["a", "b"], [0.7, 0.4])
    result |= {"both": picture(model), "active": model.active_adapters()}
    model.fuse_lora()
    assert near(picture(model), result["both"])
    model.unfuse_lora()
    assert near(picture(model), result["both"])
    partly = unet()
    partly.load_lora_adapter(dict(first), prefix=None, adapter_name="a")
    partly.load_lora_adapter(dict(second), prefix=None, adapter_name="b")
    partly.set_adapters(["a", "b"], [0.7, 0.4])
    partly.fuse_lora(adapter_names=["b"])
    if "inlay" in sys.modules:
        # What is active does not depend on what is merged; with HF's layers a merged adapter hides the others.
        assert near(picture(partly), result["both"])
    partly.unload_lora()
    result["only b fused, and unloaded"] = picture(partly)
    model.set_adapters("b")
    result["b"] = picture(model)
    model.save_lora_adapter(folder / "b", adapter_name="b")
    again = unet()
    again.load_lora_adapter(folder / "b", prefix=None, adapter_name="x", use_safetensors=True)
    assert near(picture(again), result["b"])
    model.disable_lora()
    assert near(picture(model), base)
    model.enable_lora()
    assert near(picture(model), result["b"])
    model.delete_adapters("b")
    result["b deleted"] = picture(model)
    model.unload_lora()
    assert near(picture(model), base)
    model.load_lora_adapter(dict(second), prefix=None, adapter_name="a")
    assert near(picture(model), result["b"])
    model.delete_adapters("a")
    assert near(picture(model), base)
    return result


def hotswapping(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = {}
    large = tensors(unet(), 8, 3)
    small, alphas = tensors(unet(), 2, 4), LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS).to_dict()
    partial = {k: t for k, t in tensors(unet(), 4, 5).items() if "to_q" in k}
    model = unet()
    model.enable_lora_hotswap(target_rank=8)
    model.load_lora_adapter(dict(small), prefix=None, adapter_name="a")
    result["small"] = picture(model)
    memory = [q.data_ptr() for n, q in model.named_parameters() if "lora_" in n]
    for name, swapped in {"large": large, "partial": partial, "small again": small}.items():
        model.load_lora_adapter(dict(swapped), prefix=None, adapter_name="a", hotswap=True)
        result[name] = picture(model)
    assert near(result["small again"], result["small"])
    assert memory == [q.data_ptr() for n, q in model.named_parameters() if "lora_" in n]
    fresh = unet()
    fresh.load_lora_adapter(dict(large), prefix=None, adapter_name="a")
    assert near(picture(fresh), result["large"])
    fresh.load_lora_adapter(dict(small), prefix=None, adapter_name="a", hotswap=True, metadata=alphas)
    result["other alpha"] = picture(fresh)
    plain = unet()
    plain.load_lora_adapter(dict(small), prefix=None, adapter_name="a", metadata=alphas)
    assert near(picture(plain), result["other alpha"])
    plain.load_lora_adapter(dict(large), prefix=None, adapter_name="a", hotswap=True)
    assert near(picture(plain), result["large"])
    try:
        plain.load_lora_adapter({"nowhere." + k: t for k, t in large.items()}, prefix=None, adapter_name="a", hotswap=True)
    except RuntimeError as error:
        result["refused"] = "unexpected keys" in str(error)
    return result


def pipelines(folder: Path) -> dict[str, Any]:
    made = pipeline()
    base, base_words = picture(made.unet), words(made.text_encoder)
    scratch = pipeline()
    own = {f"unet.{k}": t for k, t in tensors(scratch.unet, 4, 6).items()}
    own |= {f"text_encoder.{k}": t for k, t in tensors(scratch.text_encoder, 4, 7, target_modules=["q_proj", "v_proj"]).items()}
    made.load_lora_weights(dict(own), adapter_name="a")
    result: dict[str, Any] = {"pipeline": picture(made.unet), "words": words(made.text_encoder), "listed": made.get_list_adapters()}
    made.set_adapters("a", 0.5)
    result |= {"half": picture(made.unet), "half the words": words(made.text_encoder), "active in it": made.get_active_adapters()}
    made.set_adapters("a", {"unet": {"down": 0.3, "mid": 0.0, "up": 0.9}})
    result["by block"] = picture(made.unet)
    made.set_adapters("a", 1.0)
    made.set_lora_device(["a"], "cpu")
    made.fuse_lora(lora_scale=0.5)
    result |= {"fused": picture(made.unet), "fused words": words(made.text_encoder)}
    made.unfuse_lora()
    assert made.num_fused_loras == 0
    made.fuse_lora()
    made.unload_lora_weights()
    result["stays fused"] = picture(made.unet)
    assert not near(result["stays fused"], base)

    other = pipeline()
    other.load_lora_weights(dict(own), adapter_name="a")
    other.disable_lora()
    assert near(picture(other.unet) + words(other.text_encoder), base + base_words)
    other.enable_lora()
    other.delete_adapters("a")
    assert near(picture(other.unet) + words(other.text_encoder), base + base_words)
    other.load_lora_weights(dict(own), adapter_name="a")
    assert near(picture(other.unet), result["pipeline"])
    other.unload_lora_weights()
    assert near(picture(other.unet) + words(other.text_encoder), base + base_words)
    assert not any("lora" in n or "adapters" in n for n, _ in [*other.unet.named_modules(), *other.text_encoder.named_modules()])
    return result


def main(folder: Path) -> dict[str, Any]:
    stored = unet()
    stored.load_lora_adapter(tensors(unet(), 4, 1), prefix=None, adapter_name="a")
    stored.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    cast = {"in 8 bits": picture(stored), "adapters in": sorted({str(q.dtype) for n, q in stored.named_parameters() if "lora_" in n})}
    sizes = (1, 7, 12, 36, 64, 127, 360, 768, 1000)
    factors = [list(factorization(n, factor)) for n in sizes for factor in (-1, 2, 4, 5, 8, 16)]
    return models(folder) | hotswapping(folder) | pipelines(folder) | cast | {"factorization": factors}
