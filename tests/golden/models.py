"""Small random models of the shapes that people adapt."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.pytorch_utils import Conv1D

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}


def seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def again() -> nn.Module:
        torch.manual_seed(5)
        model = build()
        for q in model.parameters():
            # Biases start from zero and norms from one, which would hide mistakes with them.
            q.data += 0.05 * torch.randn(q.shape)
        return model.eval()

    return again


def llama(tied: bool = False) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=tied, attention_bias=True))


def bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(**SIZES, num_labels=3, hidden_dropout_prob=0.0))


def gpt2() -> nn.Module:
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16, **still))


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2))


def gpt_oss() -> nn.Module:
    config = GptOssConfig(**SIZES, num_key_value_heads=1, head_dim=8, num_local_experts=3, num_experts_per_tok=2)
    return GptOssForCausalLM(config)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(3, 4, 3, padding=1)
        self.plane = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.plain = nn.Conv2d(6, 6, 1, bias=False)
        self.space = nn.Conv3d(2, 4, (1, 3, 3), padding=(0, 1, 1))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.line(x))
        y = torch.tanh(self.plane(y.unsqueeze(2).expand(-1, -1, 4, -1)))
        y = torch.tanh(self.plain(y)).unflatten(1, (2, 3))
        y = torch.tanh(self.space(y))
        return self.head(y.flatten(1).unflatten(1, (12, -1)).mean(-1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mixed = Conv1D(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(self.attention(x, x, x, need_weights=False)[0].contiguous())


def tokens(**more: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {"input_ids": torch.randint(0, 40, (3, 6), generator=generator), **more}


def reals(*shape: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"x": torch.randn(*shape, generator=torch.Generator().manual_seed(7))}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "llama": (seeded(llama), tokens),
    "llama-tied": (seeded(lambda: llama(True)), tokens),
    "bert": (seeded(bert), tokens),
    "gpt2": (seeded(gpt2), tokens),
    "mixtral": (seeded(mixtral), tokens),
    "gpt-oss": (seeded(gpt_oss), tokens),
    "convolutions": (seeded(Convolutions), reals(2, 3, 8)),
    "attention": (seeded(Attention), reals(2, 5, 8)),
}
