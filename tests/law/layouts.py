"""The hosts on which the law is tested: one small, hostile example a layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D

BATCH = 4


class Model(nn.Module):
    """A host inside a model, with options of its call."""

    def __init__(self, host: nn.Module, call: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.host, self.call = host, call

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.host(*inputs) if self.call is None else self.call(self.host, *inputs)


class Tied(nn.Module):
    """An embedding and an output head with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.host, self.head = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
        self.head.weight = self.host.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.host

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.host(ids)))


class Raw(nn.Module):
    """A matrix that no layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.mixing.T)


@dataclass
class Layout:
    """One kind of host.

    Attributes:
        build: the host, or the whole model.
        inputs: the arguments of its call, the batch in front.
        call: how it is called, where that is not ``host(*inputs)``.
        targets: the fields of a configuration that point at it.
        no_graph: why torch.compile cannot take the bare host as one graph; empty where it can.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    call: Callable[..., Any] | None = None
    targets: dict[str, Any] = field(default_factory=lambda: {"target_modules": ["host"]})
    no_graph: str = ""

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        torch.manual_seed(1)
        built = self.build()
        model = built if isinstance(built, Tied) else Model(built, self.call)
        for q in model.parameters():
            # Norms start from ones and experts from memory that nobody wrote.
            q.data = torch.randn(q.shape) / 2
        return model.to(dtype)

    def example(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        torch.manual_seed(2)
        return tuple(t.to(dtype) if t.is_floating_point() else t for t in self.inputs())


def reals(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(BATCH, *shape),)


def ids(count: int, tokens: int = 9) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randint(0, tokens, (BATCH, count)),)


def first(host: nn.MultiheadAttention, *inputs: Tensor) -> Tensor:
    return host(*inputs, need_weights=False)[0]


def itself(host: nn.MultiheadAttention, x: Tensor) -> Tensor:
    return first(host, x, x, x)


def routed() -> tuple[Tensor, ...]:
    choice = torch.stack([torch.randperm(3)[:2] for _ in range(2 * BATCH)])
    return torch.randn(2 * BATCH, 8), choice, torch.softmax(torch.randn(2 * BATCH, 2), -1)


def experts(cls: type[nn.Module], config: type[MixtralConfig | GptOssConfig], how: str) -> nn.Module:
    chosen = config(hidden_size=8, intermediate_size=6, num_local_experts=3, num_experts_per_tok=2)
    chosen._experts_implementation = how
    return cls(chosen)


EXPERTS = {"target_modules": [], "target_parameters": ["host.gate_up_proj", "host.down_proj"]}
LOOPS = "the host loops over the experts that were hit, which depends on the data"

LAYOUTS = [
    Layout("linear", lambda: nn.Linear(8, 6), reals(3, 8)),
    Layout("linear-no-bias", lambda: nn.Linear(6, 8, bias=False), reals(6)),
    Layout("conv1d-gpt2", lambda: Conv1D(6, 8), reals(3, 8)),
    Layout("embedding", lambda: nn.Embedding(9, 8, padding_idx=8), ids(5, 8)),
    Layout("conv1d", lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2), reals(4, 9)),
    Layout("conv2d", lambda: nn.Conv2d(4, 6, (3, 1), stride=(1, 2), dilation=(2, 1), padding=(1, 0)), reals(4, 7, 5)),
    Layout("conv2d-reflect", lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect", bias=False), reals(4, 5, 6)),
    Layout("conv2d-same", lambda: nn.Conv2d(4, 6, (2, 3), padding="same"), reals(4, 5, 6)),
    Layout("conv2d-groups", lambda: nn.Conv2d(4, 8, 3, groups=2, dilation=2), reals(4, 7, 6)),
    Layout("conv3d", lambda: nn.Conv3d(2, 4, (2, 1, 3), padding=(1, 0, 1)), reals(2, 3, 4, 4)),
    Layout("transpose1d", lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), reals(4, 5)),
    Layout("transpose1d-size", lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), reals(4, 5), lambda m, x: m(x, output_size=[12])),
    Layout("transpose2d-groups", lambda: nn.ConvTranspose2d(4, 8, (2, 3), stride=(2, 1), groups=2, bias=False), reals(4, 3, 4)),
    Layout("layer-norm", lambda: nn.LayerNorm(8), reals(3, 8)),
    Layout("group-norm", lambda: nn.GroupNorm(2, 8), reals(8, 3)),
    Layout("rms-norm", lambda: LlamaRMSNorm(8), reals(3, 8)),
    Layout("attention", lambda: nn.MultiheadAttention(8, 2, batch_first=True), reals(3, 8), itself),
    Layout(
        "attention-separate",
        lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True),
        lambda: (torch.randn(BATCH, 3, 8), torch.randn(BATCH, 5, 6), torch.randn(BATCH, 5, 4)),
        first,
    ),
    Layout("parameter", Raw, reals(3, 8), targets={"target_modules": [], "target_parameters": ["host.mixing"]}),
    Layout("experts", lambda: experts(MixtralExperts, MixtralConfig, "batched_mm"), routed, targets=EXPERTS),
    Layout("experts-transposed", lambda: experts(GptOssExperts, GptOssConfig, "eager"), routed, targets=EXPERTS, no_graph=LOOPS),
    Layout("tied", Tied, ids(5), targets={"target_modules": ["host"], "ensure_weight_tying": True}),
]
