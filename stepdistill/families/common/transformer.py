"""What families with a transformer of diffusers on latent patches have in common: flow matching, blocks, tokens as maps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.errors import UserError
from stepdistill.families.base import CheckpointInfo
from stepdistill.families.common.pipeline import PipelineFamily, read_schedule

NUM_TRAIN_TIMESTEPS = 1000
"""These networks are told 1000 sigma."""


class TransformerFamily(PipelineFamily):
    """Shared body; a subclass names pipeline and networks, and says what the network is called with."""

    network_component: ClassVar[str] = "transformer"
    has_kohya_layout: ClassVar[bool] = False

    def _schedule(self, config: Mapping[str, Any], origin: Path) -> NoiseSchedule:
        schedule = read_schedule(config, origin)
        if not schedule.is_flow or schedule.train_steps != NUM_TRAIN_TIMESTEPS:
            raise UserError(
                f"{str(origin)!r} describes {'flow matching' if schedule.is_flow else 'a VP process'} of "
                f"{schedule.train_steps} timesteps, and {self.network_class.__name__} wants flow matching of {NUM_TRAIN_TIMESTEPS}: "
                "restore the scheduler config of the original checkpoint"
            )
        return schedule

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        return list(network.get_submodule("transformer_blocks").children())

    def feature_module(self, network: nn.Module) -> nn.Module:
        """The block at three quarters of the depth: the last ones turn to the output, velocity rather than content."""
        blocks = self.blocks(network)
        return blocks[max(0, 3 * len(blocks) // 4 - 1)]

    @abstractmethod
    def tokens(self, output: Any) -> Tensor:
        """Image tokens (B, N, C) in what a block returns."""

    def feature_map(self, network: nn.Module, output: Any, x_t: Tensor) -> Tensor:
        height, width = (side // network.config.patch_size for side in x_t.shape[-2:])  # type: ignore[union-attr, operator]
        return self.tokens(output).transpose(1, 2).unflatten(2, (height, width))  # type: ignore[no-any-return]

    def feature_channels(self, info: CheckpointInfo) -> int:
        return int(info.network_config["num_attention_heads"]) * int(info.network_config["attention_head_dim"])

    def feature_stride(self, info: CheckpointInfo) -> int:
        return int(info.network_config["patch_size"])
