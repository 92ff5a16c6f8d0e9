"""Backends that need a GPU to run: their stores, on small layers with the interface of the real ones."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inlay import LoraConfig
from inlay.core.attach import attach
from inlay.core.site import Linear, site_of
from inlay.core.stores import store_of

from .layouts import Model
from .support import adapter_places, jitter

OUT, IN = 12, 16


def named(cls: type[nn.Module], name: str) -> type[nn.Module]:
    """A class as the backend's module has it."""
    cls.__module__, _, cls.__qualname__ = name.rpartition(".")
    cls.__name__ = cls.__qualname__
    return cls


def codes(low: int = -7, high: int = 8) -> Tensor:
    return torch.randint(low, high, (OUT, IN), generator=torch.Generator().manual_seed(1))


class Base(nn.Module):
    qweight: Tensor
    scales: Tensor
    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = IN, OUT
        self.register_buffer("qweight", codes().to(torch.int8).T.contiguous())
        self.register_buffer("scales", torch.rand(1, OUT) + 0.5)
        self.register_buffer("bias", torch.randn(OUT))

    def restored(self) -> Tensor:
        return self.qweight.float() * self.scales

    def forward(self, x: Tensor) -> Tensor:
        # As kernels are: without a way back.
        with torch.no_grad():
            return x @ self.restored() + self.bias


named(Base, "gptqmodel.nn_modules.qlinear.BaseQuantLinear")


class Packable(Base):
    def dequantize_weight(self) -> Tensor:
        return self.restored()


named(Packable, "gptqmodel.nn_modules.qlinear.PackableQuantLinear")


class Awq(Base):
    pass


class Eetq(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(codes().to(torch.int8).T.contiguous(), requires_grad=False)
        self.weight_scales = nn.Parameter(torch.rand(OUT) + 0.5, requires_grad=False)
        self.bias = nn.Parameter(torch.randn(OUT), requires_grad=False)

    def restored(self) -> Tensor:
        return self.weight.float() * self.weight_scales

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return x @ self.restored() + self.bias


named(Eetq, "transformers.integrations.eetq.EetqLinear")


class Aqlm(nn.Module):
    """Two codebooks of vectors of four inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = IN, OUT
        self.codebooks = nn.Parameter(torch.randn(2, 256, 1, 4), requires_grad=False)
        self.codes = nn.Parameter(torch.randint(-128, 128, (OUT, IN // 4, 2)).to(torch.int8), requires_grad=False)
        self.scales = nn.Parameter(torch.rand(OUT, 1, 1, 1), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(OUT), requires_grad=False)

    def restored(self) -> Tensor:
        w = torch.zeros(IN, OUT)
        for i in range(OUT):
            for j in range(IN // 4):
                for k in range(2):
                    w[4 * j : 4 * j + 4, i] += self.codebooks[k, int(self.codes[i, j, k]) % 256, 0] * self.scales[i].flatten()
        return w

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return x @ self.restored() + self.bias


named(Aqlm, "aqlm.inference.QuantizedLinear")


class Patched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(codes().T.contiguous().to(torch.float8_e4m3fn), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(OUT), requires_grad=False)
        self._mod_extra_config = SimpleNamespace(config_params={"hp_dtype": torch.float32})

    def restored(self) -> Tensor:
        return self.weight.float() * 0.25

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return x @ self.restored() + self.bias


named(Patched, "neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules.PatchedLinear")


class Scheme(nn.Linear):
    """A layer of torch that compressed-tensors has packed."""

    def __init__(self) -> None:
        super().__init__(IN, OUT)
        del self.weight
        self.weight_packed = nn.Parameter(codes().to(torch.int8), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.rand(OUT, 1) + 0.5, requires_grad=False)
        self.quantization_scheme = object()

    def restored(self) -> Tensor:
        return (self.weight_packed.float() * self.weight_scale).T

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return x @ self.restored() + self.bias


def unpack(module: Any) -> None:
    module.weight = nn.Parameter(module.weight_packed.float() * module.weight_scale, requires_grad=False)
    del module.weight_packed


HOSTS = [Packable, Awq, Eetq, Aqlm, Patched, Scheme]


@pytest.fixture(autouse=True)
def _compressed_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    base = SimpleNamespace(decompress_module=unpack)
    monkeypatch.setitem(sys.modules, "compressed_tensors", SimpleNamespace(compressors=SimpleNamespace(base=base)))


@pytest.mark.parametrize("host", HOSTS, ids=lambda h: h.__name__)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_adapters_on_layers_that_cannot_be_written(host: type[nn.Module], options: dict[str, Any]) -> None:
    model = Model(host()).requires_grad_(False)
    layer: Any = model.host
    site = site_of(layer)
    assert type(site) is Linear
    assert tuple(site.shape) == (OUT, IN)
    assert site.dtype == torch.float32
    assert not store_of(layer).dense
    plain = layer.restored().T
    torch.testing.assert_close(site.read()[0].float(), plain)

    attach(model, LoraConfig(target_modules=["host"], r=4, **options), "a")
    jitter(model, "a")
    (place,) = adapter_places(model)
    torch.testing.assert_close(place.site.read()[0].float(), plain)
    w, b = place.fold(("a",))
    x = torch.randn(5, IN, requires_grad=True)
    y = model(x)
    torch.testing.assert_close(y, F.linear(x, w, b), rtol=1e-4, atol=1e-4)
    y.sum().backward()
    torch.testing.assert_close(x.grad, w.sum(0).expand(5, -1), rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="base='dequantized'"):
        place.merge(("a",))
    assert torch.equal(model(x), y)


def float8(block: tuple[int, int] | None) -> nn.Module:
    from transformers.integrations.finegrained_fp8 import FP8Linear

    torch.manual_seed(1)
    layer = FP8Linear(IN, OUT, block_size=block, has_bias=True)
    layer.weight = nn.Parameter(torch.randn(OUT, IN).to(torch.float8_e4m3fn), requires_grad=False)
    nn.init.uniform_(layer.weight_scale_inv, 0.5, 1.5)
    nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize("block", [None, (4, 8), (8, 12)], ids=str)
def test_float8_of_transformers(block: tuple[int, int] | None) -> None:
    """The real layer, whose kernel needs a GPU; its weight is read and written here."""
    layer: Any = float8(block)
    site = site_of(layer)
    assert site is not None
    w, _ = site.read()
    rows, columns = block or (OUT, IN)
    scale = layer.weight_scale_inv.detach().reshape(-1, -(-IN // columns))
    for i in range(OUT):
        for j in range(IN):
            assert w[i, j] == layer.weight[i, j].float() * scale[i // rows, j // columns]
    own, own_scale = layer.weight, layer.weight_scale_inv
    target = w + 0.1 * torch.randn(OUT, IN)
    site.replace(target, site.bias())
    assert layer.weight.dtype == torch.float8_e4m3fn
    assert layer.weight_scale_inv.shape == own_scale.shape
    now = site.matrix(site.store.read(layer, "weight"))
    assert (now - target).norm() < 0.04 * target.norm()
    site.restore()
    assert layer.weight is own
    assert layer.weight_scale_inv is own_scale
