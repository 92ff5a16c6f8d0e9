"""What each process of the distributed tests does. Started by torch's launcher with the name of a scenario and a folder."""

import os
import sys
from pathlib import Path

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


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    {"ddp": ddp, "fsdp2": fsdp2}[sys.argv[1]](Path(sys.argv[2]), int(os.environ["RANK"]))
    dist.barrier()
    dist.destroy_process_group()
