"""Conditioning: everything a network is told beside x_t and t, as one immutable bundle of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class MicroConditioning:
    """SDXL's micro-conditioning of one image, in pixels: where it came from and what was cut out of it."""

    original: tuple[int, int]
    """(height, width) of the file."""
    crop: tuple[int, int]
    """(top, left) of the crop after resizing."""
    target: tuple[int, int]
    """(height, width) that the network draws."""

    @classmethod
    def plain(cls, height: int, width: int) -> MicroConditioning:
        """No file behind it: original = target, crop at (0, 0), as the pipeline passes for a prompt."""
        return cls((height, width), (0, 0), (height, width))

    def time_ids(self) -> tuple[int, ...]:
        """(original h, w, crop top, left, target h, w): the order of SDXL's `add_time_ids`."""
        return (*self.original, *self.crop, *self.target)


@dataclass(frozen=True)
class Conditioning:
    """One batch of conditioning; every field is None or has B rows.

    Attributes:
        text: token embeddings, (B, L, D).
        pooled: pooled text embedding, (B, P).
        time_ids: SDXL's size and crop conditioning, (B, 6).
        mask: attention mask over tokens, (B, L), 1 = attend.
        guidance: guidance scale w that the network is told, (B,).
        second_time: second time input of flow-map students, native units, (B,).
    """

    text: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    mask: Tensor | None = None
    guidance: Tensor | None = None
    second_time: Tensor | None = None

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, rows: slice | Tensor | Sequence[int]) -> Conditioning:
        """The given rows."""
        index = rows if isinstance(rows, slice | Tensor) else torch.as_tensor(list(rows))
        return self._map(lambda tensor: tensor[index])

    def repeat(self, times: int) -> Conditioning:
        """Every row `times` times in a row: a, a, b, b, ..."""
        return self._map(lambda tensor: tensor.repeat_interleave(times, dim=0))

    def expand(self, batch: int) -> Conditioning:
        """One row (the null conditioning, say) shown `batch` times without a copy."""
        return self._map(lambda tensor: tensor.expand(batch, *tensor.shape[1:]))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """Moved; `dtype` applies to floating-point embeddings, never to time ids, guidance or times."""
        moved = self._map(lambda tensor: tensor.to(device))
        if dtype is None:
            return moved
        pooled = moved.pooled.to(dtype) if moved.pooled is not None else None
        return replace(moved, text=moved.text.to(dtype), pooled=pooled)

    def with_size_of(self, other: Conditioning) -> Conditioning:
        """These prompts with the size and crop of `other`: guidance must not compare different sizes."""
        return replace(self, time_ids=other.time_ids)

    def told(self, w: Tensor | float) -> Conditioning:
        """With the guidance scale w, a number or (B,), for a network that is told it."""
        dtype = torch.float32 if self.guidance is None else self.guidance.dtype
        return replace(self, guidance=torch.as_tensor(w).to(self.text.device, dtype).expand(len(self)))

    def masked(self) -> Conditioning:
        """With zeros where the mask hides the text, whatever an encoder said there; itself where there is no mask."""
        if self.mask is None:
            return self
        return replace(self, text=self.text.masked_fill(self.mask[..., None] == 0, 0))

    def detach(self) -> Conditioning:
        return self._map(Tensor.detach)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Rows of all parts, in order; a field must be set in all of them or in none.

        Raises:
            ValueError: a field is set in some parts only.
        """
        joined: dict[str, Tensor | None] = {}
        for item in fields(Conditioning):
            tensors = [vars(part)[item.name] for part in parts]
            if all(tensor is None for tensor in tensors):
                joined[item.name] = None
            elif any(tensor is None for tensor in tensors):
                raise ValueError(
                    f"conditioning field {item.name!r} is set in some parts of a batch and missing in others"
                )
            else:
                joined[item.name] = torch.cat(tensors)
        return Conditioning(**joined)  # type: ignore[arg-type]

    def _map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        changed = {f.name: function(v) for f in fields(self) if (v := vars(self)[f.name]) is not None}
        return replace(self, **changed)
