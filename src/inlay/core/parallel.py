"""Tensor parallelism as transformers has it: each device keeps a slice of a layer's weight, and the layer's forward is wrapped in what
makes its input and its output fit.

Adapters are whole on every device, and so is what they see of input, output and weight; the host alone works on slices. So every
method acts here as it does elsewhere, with the same numbers and with the same gradients on all devices. The price is that what a
layer gives is gathered on the way through its adapters.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Forward = Callable[..., Any]


def split(forward: Forward | None) -> bool:
    """Whether a forward on an instance is what transformers wraps around that of a layer whose weight is split over devices."""
    return getattr(forward, "__name__", "") == "tp_forward" and getattr(forward, "__module__", "").startswith("transformers.")


def on_whole_tensors(module: nn.Module, forward: Forward, adapted: Forward) -> tuple[Forward, Forward]:
    """
    Args:
        forward: of a host, as transformers wrapped it.
        adapted: the host's forward with adapters.

    Returns:
        The host's own forward, from whole tensors to whole tensors; and ``adapted`` inside of transformers' wrapping.
    """
    known = inspect.getclosurevars(forward).nonlocals
    style, mesh, host = copy.copy(known["self"]), known["mesh"], known["original_forward"]
    # Without gradients transformers would hand over bare slices, which do not say what they are slices of.
    style.should_use_local_tensors = lambda _: False

    def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return whole(host(replicated(x, mesh), *args, **kwargs))

    def inside(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return replicated(adapted(whole(x), *args, **kwargs), mesh)

    before, module.forward = module.__dict__.pop("forward"), inside
    try:
        style.install_forward(module, mesh)
        return call, module.forward
    finally:
        module.forward = before


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is split over devices, gathered; others as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


def whole_parameters(module: nn.Module) -> dict[int, nn.Parameter]:
    """What a whole copy of a module has in place of its parameters that are split over devices, by their ``id``."""
    return {id(q): nn.Parameter(whole(q.detach()), q.requires_grad) for q in module.parameters() if hasattr(q, "placements")}


def unwrap(module: nn.Module) -> None:
    """Take what fits input and output to a split weight off a copy of a module that is whole."""
    for part in module.modules():
        own = vars(part)
        if "_split_forward" in own or split(own.get("forward")):
            for name in ("forward", "_host_forward", "_split_forward"):
                own.pop(name, None)


def placed_like(old: Tensor, new: Tensor) -> Tensor:
    """New values in the dtype of old ones, and split over devices as those are."""
    new = new.detach().to(old.dtype, copy=True)
    if not hasattr(old, "placements"):
        return new
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(old, DTensor)
    # Every device has all of it, so that each keeps its part and nothing is sent.
    return distribute_tensor(new, old.device_mesh, old.placements, src_data_rank=None)


def replicated(tensor: Tensor, mesh: Any) -> Tensor:
    """A tensor that every device of a mesh has, marked as that."""
    from torch.distributed.tensor import DTensor, Replicate

    return tensor if isinstance(tensor, DTensor) else DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
