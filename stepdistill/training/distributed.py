"""What the loop asks of the processes it shares its work with. Where there is one, nothing here does anything.

Replicated: no wrapper around any network; every process holds all roles and `reduce_gradients` takes their mean, once a role
and update. (DDP's reducer leaves adapters out that were frozen when it was built, and those of a discarded forward.)
Sharded: FSDP2 reduces as backward runs, and only what is not sharded (heads) is left to do.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from stepdistill.config.schema import TrainingConfig
from stepdistill.errors import UserError
from stepdistill.roles.triple import Triple
from stepdistill.runtime.sharding import whole

GRADIENT_BUCKET_NUMEL = 1 << 26
"""Elements of gradients that travel together: all of a LoRA's, and a quarter gigabyte of a full network's at a time."""


def check_launcher(config: TrainingConfig, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse what `accelerate launch` asked for and a triple cannot do; needs no accelerator, loads no weight.

    Raises:
        UserError: DeepSpeed, FSDP 1 or its loading on one process only, sharding over a single process.
    """
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UserError(
            "the launcher asks for DeepSpeed, whose engine holds one network with one optimizer, and a triple has several of "
            "both: launch with configs/accelerate/fsdp2_8gpu.yaml to shard, or ddp_8gpu.yaml to replicate"
        )
    fsdp, alone = _is_fsdp_requested(environment), int(environment.get("WORLD_SIZE", "1")) == 1
    if fsdp and environment.get("FSDP_VERSION", "1") != "2":
        raise UserError(
            "the launcher asks for FSDP version 1, which flattens parameters and so cannot tell adapters apart: "
            "set fsdp_version: 2 in its config"
        )
    if fsdp and environment.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true":
        raise UserError(
            "the launcher asks for fsdp_cpu_ram_efficient_loading, which leaves the text encoders empty on all processes but "
            "one: set it to false in its config"
        )
    if alone and is_sharding_requested(config, environment):
        raise UserError(
            "sharding was asked for and there is one process, which would hold everything: start several with "
            "'torchrun --nproc_per_node N -m stepdistill.cli train ...', or set training.sharding to 'replicated'"
        )


def is_sharding_requested(config: TrainingConfig, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether config or launcher want networks shared out: the environment is asked, and not the accelerator, which turns
    FSDP into DDP on the CPU without saying so."""
    return config.sharding == "full" or (config.sharding == "auto" and _is_fsdp_requested(environment))


def _is_fsdp_requested(environment: Mapping[str, str]) -> bool:
    return environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


class Processes:
    """The group of processes of a run.

    Args:
        accelerator: device and world.
        config: says whether networks are sharded; "auto" follows the launcher.
    """

    def __init__(self, accelerator: Accelerator, config: TrainingConfig) -> None:
        self.accelerator = accelerator
        self.index, self.count = accelerator.process_index, accelerator.num_processes
        self.is_main_process = accelerator.is_main_process
        self.device = accelerator.device
        self.sharded = is_sharding_requested(config) and self.count > 1

    def place(self, triple: Triple) -> None:
        """Shard the triple's networks, or make sure that every process starts from the first one's roles."""
        if self.count == 1:
            return
        if self.sharded:
            mesh: DeviceMesh = init_device_mesh(self.device.type, (self.count,))
            triple.shard(mesh)
        with torch.no_grad():
            for tensor in chain.from_iterable(triple.state(role).values() for role in triple.layouts):
                if not isinstance(tensor, DTensor):
                    torch.distributed.broadcast(tensor.data, 0)

    def reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes; one that is missing on some of them counts as zero there.

        One that is missing on all stays so, as on one process: an optimizer leaves such a parameter alone.
        """
        if self.count == 1:
            return
        whole = [p for p in parameters if not isinstance(p, DTensor)]
        if not whole:
            return
        there = torch.tensor([float(p.grad is not None) for p in whole], device=self.device)
        torch.distributed.all_reduce(there)
        mine = [p for p, count in zip(whole, there.tolist(), strict=True) if count]
        for parameter in mine:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _gradient_buckets(parameter.grad for parameter in mine if parameter.grad is not None):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            torch.distributed.all_reduce(flat)
            flat /= self.count
            for gradient, reduced in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(reduced.view_as(gradient))

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Means over the processes of scalars that every process has under the same names."""
        if not values:
            return {}
        stacked = torch.stack([value.detach().to(self.device, torch.float64) for value in values.values()])
        if self.count > 1:
            torch.distributed.all_reduce(stacked)
            stacked /= self.count
        return dict(zip(values, stacked.tolist(), strict=True))

    def wait_for_everyone(self) -> None:
        """Until every process is here: what one of them looks for in a shared folder, no other may be changing yet."""
        if self.count > 1:
            torch.distributed.barrier()

    def any(self, flag: bool) -> bool:
        """True on every process if it is on one of them."""
        if self.count == 1:
            return flag
        found = torch.tensor(int(flag), device=self.device)
        torch.distributed.all_reduce(found)
        return bool(found)

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors on the main process's CPU, shards put together one at a time; nothing on the others."""
        kept = {}
        for key, tensor in tensors.items():
            value = whole(tensor)
            if self.is_main_process:
                kept[key] = value.detach().cpu()
        return kept

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """A tensor of one shape, of every process, in order."""
        if self.count == 1:
            return [tensor]
        mine = tensor.to(self.device)
        found = [torch.empty_like(mine) for _ in range(self.count)]
        torch.distributed.all_gather(found, mine)
        return [other.cpu() for other in found]


def _gradient_buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and BUCKET elements together, or one that is larger alone."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(other.numel() for other in bucket) + tensor.numel() > GRADIENT_BUCKET_NUMEL
        if bucket and (full or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
