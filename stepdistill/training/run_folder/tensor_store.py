"""Tensors that a method keeps in the run's folder, beside the checkpoints: `kept/NAME.safetensors`.

A checkpoint holds the digest alone, so a run that goes on from an earlier iteration finds out whether what lies here is still
what it put; training again past the place where a file was put replaces it by the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.files.atomic import write_atomically
from stepdistill.training.distributed import Processes

STORE_FOLDER = "kept"


class RunTensorStore:
    """The `Shelf` of a run: the main process writes, all processes read."""

    def __init__(self, folder: Path, processes: Processes) -> None:
        self.folder, self.processes = folder, processes

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """See `methods.base.Shelf`."""
        whole = self.processes.whole(tensors)
        digest, failure = torch.zeros(32, dtype=torch.uint8), ""
        if self.processes.is_main_process:
            content = save({key: value.contiguous() for key, value in whole.items()})
            digest = _digest(content)
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomically(self._path(name), content)
            except OSError as error:
                failure = str(error)
        if self.processes.any(bool(failure)):
            raise UserError(
                f"what the method must keep could not be written to {str(self._path(name))!r} "
                f"({failure or 'on the main process'}): make room and resume with --resume latest"
            )
        return self.processes.gather(digest)[0].cpu()

    def get(self, name: str, digest: Tensor) -> dict[str, Tensor]:
        """See `methods.base.Shelf`."""
        path = self._path(name)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"{str(path)!r}, which the method kept, cannot be read ({error}): put it back, or start the run afresh"
            ) from None
        if not torch.equal(_digest(content), digest.cpu()):
            raise UserError(f"{str(path)!r} is not what the method kept there: put it back, or start the run afresh")
        return load(content)  # type: ignore[no-any-return]

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _digest(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(hashlib.sha256(content).digest()), dtype=torch.uint8)
