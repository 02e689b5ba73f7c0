"""The triple generator / fake_score / real_score, and any further named role, on as few networks as possible.

real_score is the frozen base. A `lora` role is a named adapter on that base; a `full` role is a network of its own in
float32; an `adapter` role is the base with guidance adapters beside it. They may be mixed, and a method cannot tell which it
was given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from stepdistill.diffusion.draws import derive_seed
from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.families.base import Family
from stepdistill.roles.denoiser import Denoiser
from stepdistill.roles.guidance_conditioning import (
    GuidanceConditioner,
    GuidanceConditionerSettings,
    attach_guidance_adapter_file,
    attach_new_guidance_adapter,
    attach_new_guidance_embedding,
    restore_guidance,
)
from stepdistill.roles.guidance_modules import GuidanceAdapterSettings
from stepdistill.roles.lora import AdapterBank, LoraSettings
from stepdistill.roles.state_check import check_state_matches
from stepdistill.runtime.gradient_checkpointing import checkpointed
from stepdistill.runtime.parking import OffloadedParameters
from stepdistill.runtime.quantization import dequantized
from stepdistill.runtime.sharding import reshard, shard, shard_like

RoleMode: TypeAlias = Literal["lora", "full", "adapter"]
GENERATOR, FAKE_SCORE, REAL_SCORE = "generator", "fake_score", "real_score"


@dataclass(frozen=True)
class RoleLayout:
    """How one role is held: a LoRA on the base, a full network, or guidance adapters beside the base.

    Attributes:
        guide: how its network is told the guidance scale; None where it is told none.
    """

    mode: RoleMode
    lora: LoraSettings | None = None
    guide: GuidanceConditionerSettings | None = None


class Triple:
    """Roles by name; `generator`, `fake_score` and `real_score` as attributes.

    Args:
        network: the base; frozen here for good.
        family, schedule: of its checkpoint.
        layouts: role name -> layout, for every trainable role.
        compute_dtype: dtype of the networks' forwards; full roles keep float32 weights under autocast.
        seed: of the adapters' random first weights.
        teacher_adapter: file of guidance adapters, with which real_score is guided in one call.

    Attributes:
        guides: role -> what tells its network the guidance scale.
        playing: the role that is asked, while one is.
        frozen: models that losses ask beside the networks, by their use; nothing here trains, shards or saves them.
    """

    def __init__(
        self,
        network: nn.Module,
        family: Family,
        schedule: NoiseSchedule,
        layouts: Mapping[str, RoleLayout],
        *,
        compute_dtype: torch.dtype | None = None,
        seed: int = 0,
        teacher_guidance_adapter: str | None = None,
    ) -> None:
        self.base = network.eval().requires_grad_(False)
        self.family = family
        self.schedule = schedule
        self.compute_dtype = compute_dtype
        self.seed = seed
        self.bank = AdapterBank(self.base)
        self.layouts: dict[str, RoleLayout] = {}
        self.networks: dict[str, nn.Module] = {}
        self.guidance_conditioners: dict[str, GuidanceConditioner] = {}
        self.heads: dict[str, dict[str, nn.Module]] = {}
        self.copies: dict[str, str] = {}
        self.frozen: dict[str, nn.Module] = {}
        self._offloaded: dict[str, OffloadedParameters] = {}
        self.active_role = REAL_SCORE
        self.sharded = False
        self._checkpointing = False
        # full copies are taken from the base before adapters are injected into it
        for name, layout in sorted(layouts.items(), key=lambda item: item[1].mode != "full"):
            self.add_role(name, layout)
        if teacher_guidance_adapter is not None:
            self.guidance_conditioners[REAL_SCORE] = attach_guidance_adapter_file(self.base, teacher_guidance_adapter)

    # ---------------------------------------------------------------- roles

    @property
    def generator(self) -> Denoiser:
        return self.denoiser(GENERATOR)

    @property
    def fake_score(self) -> Denoiser:
        return self.denoiser(FAKE_SCORE)

    @property
    def real_score(self) -> Denoiser:
        return self.denoiser(REAL_SCORE)

    def denoiser(self, role: str) -> Denoiser:
        """The role's denoiser. Cheap: holds no tensor of its own."""
        if role != REAL_SCORE and role not in self.layouts:
            raise KeyError(f"there is no role {role!r}; there are {[REAL_SCORE, *self.layouts]}")
        network, guide = self.networks.get(role, self.base), self.guidance_conditioners.get(role)
        return Denoiser(
            network, self.family, self.schedule, lambda: self._activate_role(role), self.compute_dtype, guide
        )

    @contextmanager
    def _activate_role(self, role: str) -> Iterator[None]:
        """Inside, the role's network is this role."""
        before, self.active_role = self.active_role, role
        adapter = role if role in self.bank.settings else None
        try:
            with self.on_device(role), nullcontext() if role in self.networks else self.bank.role(adapter):
                yield
        finally:
            self.active_role = before

    def add_role(self, name: str, layout: RoleLayout, *, trainable: bool = True) -> None:
        """Add a role equal to the base.

        Raises:
            UserError: LoRA targets that match nothing, or a network that has no place for a guide.
        """
        if name in self.layouts or name == REAL_SCORE:
            raise ValueError(f"there is a role {name!r} already")
        if layout.mode == "full":
            source = next(iter(self.networks.values()), self.base)
            if source is self.base and self.bank.settings:
                raise RuntimeError("full roles are copied from the untouched base: add them before the LoRA roles")
            network = self.copied(source)
            network.load_state_dict(self.base_state() if source is not self.base else source.state_dict())
            if next(network.parameters()).dtype != torch.float64:
                network = network.float()
            self.networks[name] = network.eval().requires_grad_(trainable)
        elif layout.mode == "lora":
            if layout.lora is None:
                raise ValueError(f"role {name!r} is a LoRA without LoRA settings")
            self.bank.add(name, layout.lora, seed=derive_seed(self.seed, "lora", name), trainable=trainable)
        if layout.guide is not None:
            self.guidance_conditioners[name] = self._attach_guidance_conditioner(
                self.networks.get(name, self.base), layout.guide
            )
            self.guidance_conditioners[name].requires_grad_(trainable)
        self.layouts[name] = layout
        if self._checkpointing:
            self.enable_gradient_checkpointing()

    def add_copy(self, name: str, source: str) -> None:
        """Add an untrained role that starts equal to `source`, in float32 (EMA, frozen references)."""
        self.add_role(name, self.layouts[source], trainable=False)
        self.copies[name] = source
        self.copy_role(source, name)

    def _attach_guidance_conditioner(
        self, network: nn.Module, settings: GuidanceConditionerSettings
    ) -> GuidanceConditioner:
        if isinstance(settings, GuidanceAdapterSettings):
            return attach_new_guidance_adapter(network, settings, derive_seed(self.seed, "guide"))
        return attach_new_guidance_embedding(network, settings, self.family.guidance_embedding_target(network))

    def copied(self, network: nn.Module) -> nn.Module:
        """A copy of a network, without the guides that are attached to it."""
        beside = [
            guide for role, guide in self.guidance_conditioners.items() if self.networks.get(role, self.base) is network
        ]
        for guide in beside:
            guide.detach()
        copied = copy.deepcopy(network)
        for guide in beside:
            guide.attach(network)
        return copied

    @torch.no_grad()
    def reset_role(self, name: str) -> None:
        """Set a role back to the base: zero B for a LoRA (A stays), the base's weights for a full network, a silent guide."""
        self.reshard()
        if name in self.guidance_conditioners:
            self.guidance_conditioners[name].zero_output()
        if name in self.networks:
            self.networks[name].load_state_dict(self.base_state())
            return
        for key, parameter in self.bank.parameters(name):
            if ".lora_B." in key:
                parameter.zero_()

    def attach_head(self, role: str, name: str, head: nn.Module) -> None:
        """A further trainable module that belongs to a role's optimizer (a discriminator head)."""
        self.heads.setdefault(role, {})[name] = head

    def head(self, role: str, name: str) -> nn.Module:
        return self.heads[role][name]

    # ---------------------------------------------------------------- parameters

    def network_parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The role's own parameters without heads: LoRA matrices, or the whole network, and its guide's under `guide.`."""
        network = self.networks.get(role)
        owned = dict(self.bank.parameters(role) if network is None else network.named_parameters())
        if role in self.guidance_conditioners:
            owned.update({f"guide.{key}": value for key, value in self.guidance_conditioners[role].named_parameters()})
        return owned

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """All that the role's optimizer steps: its own parameters, then its heads' under `head.NAME.`."""
        owned = self.network_parameters(role)
        for head_name, head in self.heads.get(role, {}).items():
            owned.update({f"head.{head_name}.{key}": value for key, value in head.named_parameters()})
        return owned

    @contextmanager
    def training(self, role: str) -> Iterator[None]:
        """Only this role's parameters take gradients inside: a loss that crosses another role leaves nothing there.

        Must enclose forward and backward, since checkpointed segments run again in backward.
        """
        others = [p for name in self.layouts if name != role for p in self.parameters(name).values() if p.requires_grad]
        # FSDP2 copies requires_grad once, when it first gathers a parameter: there the gradients are dropped afterwards
        for parameter in others:
            parameter.requires_grad_(self.sharded)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)
                if self.sharded:
                    parameter.grad = None

    @torch.no_grad()
    def copy_role(self, source: str, target: str) -> None:
        """Overwrite target's own parameters with source's (same layout)."""
        self.reshard()
        values = {**self.network_parameters(source), **self._guidance_conditioner_buffers(source)}
        for key, tensor in {**self.network_parameters(target), **self._guidance_conditioner_buffers(target)}.items():
            tensor.copy_(values[key])

    def _guidance_conditioner_buffers(self, role: str) -> dict[str, Tensor]:
        named = self.guidance_conditioners[role].named_buffers() if role in self.guidance_conditioners else ()
        return {f"guide.{key}": value for key, value in named}

    @torch.no_grad()
    def lerp_role(self, target: str, source: str, weight: float) -> None:
        """target <- target + weight (source - target), parameter by parameter, by name (EMA)."""
        self.reshard()
        values = self.network_parameters(source)
        for key, parameter in self.network_parameters(target).items():
            # where source lives, also for a parked target: another device would round otherwise
            moved = parameter.to(values[key].device)
            moved.lerp_(values[key].to(parameter.dtype), weight)
            if moved is not parameter:
                parameter.copy_(moved)

    def state(self, role: str) -> dict[str, Tensor]:
        """Detached parameters of a role, and buffers of its heads and guide, for a checkpoint."""
        state = {key: value.detach() for key, value in self.parameters(role).items()}
        state.update(self._guidance_conditioner_buffers(role))
        for head_name, head in self.heads.get(role, {}).items():
            state.update({f"head.{head_name}.{key}": value for key, value in head.named_buffers()})
        return state

    @torch.no_grad()
    def load_state(self, role: str, tensors: Mapping[str, Tensor]) -> None:
        """Load into the existing parameters.

        Raises:
            UserError: missing or unexpected keys, or another shape; nothing is changed then.
        """
        own = self.state(role)
        check_state_matches(role, own, tensors)
        for key, value in own.items():
            value.copy_(shard_like(value, tensors[key]))

    # ---------------------------------------------------------------- processes and memory

    def shard(self, mesh: DeviceMesh) -> None:
        """Give every process a share of every network (heads stay whole). All roles must be there by now."""
        for network in (self.base, *self.networks.values()):
            shard(network, self.family.blocks(network), mesh)
        self.sharded = True

    def reshard(self) -> None:
        """Sharded networks hold their shares alone afterwards: a forward without backward leaves its root gathered."""
        if self.sharded:
            for network in (self.base, *self.networks.values()):
                reshard(network)

    def offload_role(self, role: str) -> None:
        """Keep an untrained role in main memory from now on; its denoiser brings it to the device for each forward."""
        self._offloaded[role] = OffloadedParameters(self.network_parameters(role).values())

    def on_device(self, role: str) -> AbstractContextManager[None]:
        """A parked role stays on the device inside, for several forwards in a row; nothing happens to other roles."""
        return self._offloaded[role].on_device() if role in self._offloaded else nullcontext()

    def enable_gradient_checkpointing(self) -> None:
        """Trade compute for memory; each segment recomputes under the role of its own forward."""
        self._checkpointing = True
        for network, function in [
            (self.base, self._checkpointed),
            *((n, checkpointed) for n in self.networks.values()),
        ]:
            self.family.enable_gradient_checkpointing(network, function)

    def _checkpointed(self, function: Callable[..., Tensor], *args: Tensor) -> Tensor:
        """A block of the base that runs again as it ran: with the adapter and under the guidance of its own forward."""
        recorded_guidance = {guide: guide.recorded_guidance for guide in self.guidance_conditioners.values()}

        def run(*inputs: Tensor) -> Tensor:
            with restore_guidance(recorded_guidance):
                return function(*inputs)

        return self.bank.checkpointed(run, *args)

    def fingerprint(self) -> str:
        """Names the base by the first values of each of its tensors, before sharding; the same in float32 and bfloat16."""
        digest = blake2b(digest_size=8)
        for key, value in self.base_state().items():
            first = dequantized(value.detach()).flatten()[:64].to("cpu", torch.bfloat16)
            digest.update(f"{key} {tuple(value.shape)}".encode() + first.float().numpy().tobytes())
        return digest.hexdigest()

    def copy_base(self) -> nn.Module:
        """A copy of the base without any adapter, in float32 or better."""
        dtype = torch.float64 if next(self.base.parameters()).dtype == torch.float64 else torch.float32
        network = self.family.empty_like(self.base).to(dtype)
        network.load_state_dict(self.base_state())
        return network.eval().requires_grad_(False)

    def base_state(self) -> dict[str, Tensor]:
        """The base's weights and buffers under the names of a network without adapters, on its device, sharded as it is."""
        return {
            key.replace(".base_layer.", "."): value
            for key, value in self.base.state_dict().items()
            if ".lora_" not in key
        }
