"""Merging into quantised layers in memory writes what merging on disk writes: GPTQ, AWQ and compressed-tensors.

The layers have the interface of the real ones.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from inlay import PeftModel
from inlay.operations.stream_merge import StreamMerge

from .bases import both_dequantised, load, quantised_by, tensors
from .test_stream_quantised_words import AWQ_ORDER, awq, eight_outputs, gptq, stream, wide

IDS = torch.arange(8).unsqueeze(0)


def named(name: str) -> Any:
    """A class as the backend's module has it."""

    def rename(cls: type[nn.Module]) -> type[nn.Module]:
        cls.__module__, _, cls.__qualname__ = name.rpartition(".")
        cls.__name__ = cls.__qualname__
        return cls

    return rename


@named("gptqmodel.nn_modules.qlinear.BaseQuantLinear")
class Base(nn.Module):
    """Codes in buffers, and a forward that keeps what it has made of them until it is told that they are others."""

    def __init__(self, parts: dict[str, Tensor], shape: torch.Size, bits: int) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.bits, self.cleared, self.made = bits, 0, None
        for name, tensor in parts.items():
            self.register_buffer(name, tensor.clone())

    def clear_weight_cache(self) -> None:
        self.made = None
        self.cleared += 1

    def restored(self) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if self.made is None:
            self.made = self.restored().to(x.dtype)
        return x @ self.made


def fields(words: np.ndarray, bits: int) -> np.ndarray:
    """The codes ``(n, columns)`` of columns that are one long number each."""
    binary = np.unpackbits(np.ascontiguousarray(words.T).view(np.uint8), axis=1, bitorder="little")
    return (binary.reshape(len(binary), -1, bits) * (1 << np.arange(bits))).sum(-1).T


@named("gptqmodel.nn_modules.qlinear.PackableQuantLinear")
class Packable(Base):
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    # What its zeros lack.
    less = 0

    def restored(self) -> Tensor:
        groups = self.g_idx.numpy()
        zeros = (fields(self.qzeros.numpy().T, self.bits).T + self.less) % 2**self.bits
        return torch.from_numpy((fields(self.qweight.numpy(), self.bits) - zeros[groups]) * self.scales.numpy()[groups]).half()

    def dequantize_weight(self) -> Tensor:
        return self.restored()


class FirstVersion(Packable):
    less = 1


class Turned(Packable):
    """A kernel that has put the words in another order."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.qweight = self.qweight.flip(1)

    def restored(self) -> Tensor:
        self.qweight = self.qweight.flip(1)
        found = super().restored()
        self.qweight = self.qweight.flip(1)
        return found


class Awq(Base):
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor

    def restored(self) -> Tensor:
        def outputs(words: Tensor) -> np.ndarray:
            own = words.numpy().view(np.uint32)
            found = np.zeros((len(own), own.shape[1] * 8), np.int64)
            for place, output in enumerate(AWQ_ORDER):
                found[:, output::8] = own >> (4 * place) & 15
            return found

        size = self.in_features // len(self.scales)
        groups = np.arange(self.in_features) // size
        return torch.from_numpy((outputs(self.qweight) - outputs(self.qzeros)[groups]) * self.scales.numpy()[groups])


def with_layers(base: Path, dense: Path, make: Any) -> Any:
    """The model of a folder as its backend would load it."""
    model, found = load(dense), tensors(base)
    for path, module in list(model.named_modules()):
        parts = {key.removeprefix(f"{path}."): t for key, t in found.items() if key.rpartition(".")[0] == path}
        if isinstance(module, nn.Linear) and set(parts) - {"weight"}:
            model.set_submodule(path, make(parts, module.weight.shape))
    return model


def parts_of(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def same(one: Tensor, other: Tensor) -> bool:
    """To the bit, whatever the numbers are."""
    return one.dtype == other.dtype and torch.equal(*(t.detach().contiguous().view(torch.uint8) for t in (one, other)))


AGAIN = r"\d+ merged weights were quantised again"


def both_ways(base: Path, folder: Path, model: Any, tmp_path: Path) -> Any:
    """Merged on disk and in memory: the same bits. Returns the merged model."""
    merge = StreamMerge(base, [folder], base_dtype="requantized")
    on_disk, before = tensors(merge.run(tmp_path / "again")), tensors(base)
    tuned = PeftModel.from_pretrained(model, folder)
    held = parts_of(model)
    plain = model(IDS).logits
    with pytest.warns(UserWarning, match=AGAIN):
        tuned.merge_adapter()
    merged = model(IDS).logits
    assert not torch.equal(merged, plain)
    tuned.unmerge_adapter()
    assert all(t is held[name] for name, t in parts_of(model).items())
    with pytest.warns(UserWarning, match=AGAIN) as told:
        made = tuned.merge_and_unload()
    share = max(r.of_weight for r in merge.rounding.values())
    assert f"up to {share:.1%} of their size" in str(told[-1].message)
    assert torch.equal(made(IDS).logits, merged)
    found = parts_of(made)
    assert [key for key, expected in on_disk.items() if not same(found[key], expected)] == []
    assert len({key for key, t in on_disk.items() if not same(t, before[key])}) == 4
    return made


@pytest.mark.parametrize(
    ("bits", "size", "mixed", "layer"),
    [
        (4, 16, False, Packable),
        (4, 32, True, FirstVersion),
        (3, 32, False, Packable),
        (8, 96, False, FirstVersion),
        (2, 16, True, Packable),
    ],
)
def test_gptq(bits: int, size: int, mixed: bool, layer: type[Packable], tmp_path: Path) -> None:
    version = "gptq" if layer.less else "gptq_v2"
    config = {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": mixed, "checkpoint_format": version}
    base, dense = quantised_by(gptq(bits, size, mixed, layer.less), config, tmp_path, wide)
    folder = both_dequantised(base, dense, tmp_path)
    made = both_ways(base, folder, with_layers(base, dense, lambda parts, shape: layer(parts, shape, bits)), tmp_path)
    assert made.model.layers[0].self_attn.q_proj.cleared >= 3


def test_zeros_that_a_kernel_has_put_right(tmp_path: Path) -> None:
    """A file of the first version, whose zeros the backend has added one to as it read them."""
    base, dense = quantised_by(gptq(4, 32, False, 1), {"quant_method": "gptq", "bits": 4}, tmp_path, wide)
    folder = both_dequantised(base, dense, tmp_path)

    def right(parts: dict[str, Tensor], shape: torch.Size) -> nn.Module:
        zeros = (fields(parts["qzeros"].numpy().T, 4).T + 1) % 16
        return Packable({**parts, "qzeros": stream(zeros.T, 4).T.contiguous()}, shape, 4)

    model, merge = with_layers(base, dense, right), StreamMerge(base, [folder], base_dtype="requantized")
    with pytest.warns(UserWarning, match=AGAIN):
        made = PeftModel.from_pretrained(model, folder).merge_and_unload()
    on_disk = tensors(merge.run(tmp_path / "again"))
    codes = {key: t for key, t in made.named_buffers() if key.endswith("qweight")}
    assert len(codes) == 14
    assert all(torch.equal(t, on_disk[key]) for key, t in codes.items())


def test_awq(tmp_path: Path) -> None:
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    base, dense = quantised_by(awq(32), config, tmp_path, wide)
    folder = both_dequantised(base, dense, tmp_path)
    made = both_ways(base, folder, with_layers(base, dense, lambda parts, shape: Awq(parts, shape, 4)), tmp_path)
    layer = made.model.layers[0].mlp.down_proj
    assert torch.equal(layer.qweight, eight_outputs(np.round(codes_by_awq(layer)).astype(np.int64)))


def codes_by_awq(layer: Any) -> np.ndarray:
    zeros = np.zeros(layer.scales.shape, np.int64)
    for place, output in enumerate(AWQ_ORDER):
        zeros[:, output::8] = layer.qzeros.numpy().view(np.uint32) >> (4 * place) & 15
    groups = np.arange(layer.in_features) // (layer.in_features // len(zeros))
    scales = layer.scales.float().numpy()[groups]
    return np.divide(layer.restored().numpy(), scales, out=np.zeros_like(scales), where=scales != 0) + zeros[groups]


@pytest.mark.parametrize("layer", [Turned, Awq])
def test_an_order_of_the_kernels_own_is_refused(layer: type[Base], tmp_path: Path) -> None:
    """What the codes would mean in a file is not what the layer makes of them."""
    base, dense = quantised_by(gptq(4, 32, False, 0), {"quant_method": "gptq", "bits": 4, "format": "gptq_v2"}, tmp_path, wide)
    folder = both_dequantised(base, dense, tmp_path)

    class Odd(layer):
        def restored(self) -> Tensor:
            return super().restored() if layer is Turned else torch.ones(self.in_features, self.out_features).half()

    model = with_layers(base, dense, lambda parts, shape: Odd(parts, shape, 4))
    tuned, before = PeftModel.from_pretrained(model, folder), {key: t.clone() for key, t in parts_of(model).items()}
    with pytest.raises(TypeError, match=r"Odd of gptqmodel keeps its numbers in an order .*; use .*base='dequantized'"):
        tuned.merge_and_unload()
    assert all(torch.equal(t, before[key]) for key, t in parts_of(model).items())


# ---- compressed-tensors ------------------------------------------------------------------------------------------------------------
class Scheme(nn.Linear):
    """A layer of torch that compressed-tensors has packed, and unpacks in its first call."""

    weight_scale: Tensor

    def __init__(self, parts: dict[str, Tensor], shape: torch.Size, scheme: Any) -> None:
        super().__init__(shape[1], shape[0], bias=False, device="meta")
        for name, tensor in parts.items():
            self._parameters[name] = nn.Parameter(tensor.clone(), requires_grad=False)
        self.quantization_scheme = SimpleNamespace(weights=scheme)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype.itemsize == 1:
            decompress(self)
        return nn.functional.linear(x, self.weight)


def decompress(module: Any) -> None:
    zero = module._parameters.get("weight_zero_point")
    codes = module.weight.to(module.weight_scale.dtype)
    dense = (codes if zero is None else codes - zero.to(codes.dtype)) * module.weight_scale
    module._parameters["weight"] = nn.Parameter(dense, requires_grad=False)


def in_bytes(kind: str, bits: int, symmetric: bool) -> Any:
    most = 448.0

    def quantise(_: str, w: Tensor) -> Any:
        w = w.float()
        if kind == "float":
            scale = (w.abs().amax(1, keepdim=True) / most).bfloat16()
            codes = (w / scale.float()).clamp(-most, most).to(torch.float8_e4m3fn)
            return {"weight": codes, "weight_scale": scale}, (codes.to(scale.dtype) * scale).float()
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        if symmetric:
            scale, zero = (w.abs().amax(1, keepdim=True) / (high + 0.5)).bfloat16(), torch.zeros(len(w), 1)
        else:
            span = w.amax(1, keepdim=True).clamp(min=0) - w.amin(1, keepdim=True).clamp(max=0)
            scale = (span / (high - low)).bfloat16()
            zero = (low - w.amin(1, keepdim=True).clamp(max=0) / scale.float()).round().clamp(low, high)
        codes = (w / scale.float() + zero).round().clamp(low, high).to(torch.int8)
        parts = {"weight": codes, "weight_scale": scale} | ({} if symmetric else {"weight_zero_point": zero.to(torch.int8)})
        return parts, ((codes.to(scale.dtype) - zero.to(scale.dtype)) * scale).float()

    return quantise


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    base = SimpleNamespace(decompress_module=decompress)
    monkeypatch.setitem(sys.modules, "compressed_tensors", SimpleNamespace(compressors=SimpleNamespace(base=base)))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(("kind", "bits", "symmetric"), [("float", 8, True), ("int", 8, True), ("int", 8, False), ("int", 4, True)])
@pytest.mark.parametrize("called", [False, True], ids=["packed", "unpacked"])
def test_compressed_tensors(kind: str, bits: int, symmetric: bool, called: bool, tmp_path: Path) -> None:
    weights = {"num_bits": bits, "type": kind, "strategy": "channel", "symmetric": symmetric}
    config = {"quant_method": "compressed-tensors", "format": "naive-quantized", "config_groups": {"group_0": {"weights": weights}}}
    base, dense = quantised_by(in_bytes(kind, bits, symmetric), config, tmp_path, wide, torch.bfloat16)
    folder = both_dequantised(base, dense, tmp_path)
    scheme = SimpleNamespace(**weights, actorder=None)
    model = with_layers(base, dense, lambda parts, shape: Scheme(parts, shape, scheme))
    if called:
        model(IDS)
    on_disk = tensors(StreamMerge(base, [folder], base_dtype="requantized").run(tmp_path / "again"))
    tuned, held = PeftModel.from_pretrained(model, folder), parts_of(model)
    expected = load(dense)(IDS).logits
    with pytest.warns(UserWarning, match=AGAIN):
        tuned.merge_adapter()
    tuned.unmerge_adapter()
    assert all(t is held[name] for name, t in parts_of(model).items())
    with pytest.warns(UserWarning, match=AGAIN):
        tuned.merge_adapter()
    merged = model(IDS).logits
    # The layers have been called, and unpacked, since they were merged.
    tuned.unmerge_adapter()
    with tuned.disable_adapter():
        assert torch.equal(model(IDS).logits, expected)
    with pytest.warns(UserWarning, match=AGAIN):
        made = tuned.merge_and_unload()
    assert torch.equal(made(IDS).logits, merged)
    count = 0
    for path, module in made.named_modules():
        if not isinstance(module, Scheme):
            continue
        count += 1
        scale, codes = on_disk[f"{path}.weight_scale"], on_disk[f"{path}.weight"].to(torch.bfloat16)
        zero = on_disk.get(f"{path}.weight_zero_point")
        assert torch.equal(module.weight_scale, scale)
        assert torch.equal(module.weight, (codes if zero is None else codes - zero) * scale)
        if bits == 4:
            assert on_disk[f"{path}.weight"].abs().max() <= 8
    assert count == 14


@pytest.mark.usefixtures("library")
def test_codes_before_the_first_call(tmp_path: Path) -> None:
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    config = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": {"weights": weights}}}
    base, dense = quantised_by(in_bytes("int", 8, True), config, tmp_path, wide, torch.bfloat16)
    folder = both_dequantised(base, dense, tmp_path)
    model = with_layers(base, dense, lambda parts, shape: Scheme(parts, shape, SimpleNamespace(**weights)))
    with pytest.warns(UserWarning, match=AGAIN):
        made = PeftModel.from_pretrained(model, folder).merge_and_unload()
    on_disk = tensors(StreamMerge(base, [folder], base_dtype="requantized").run(tmp_path / "again"))
    found = dict(made.named_parameters())
    assert on_disk.keys() == found.keys()
    assert [key for key in found if not torch.equal(found[key], on_disk[key])] == []
