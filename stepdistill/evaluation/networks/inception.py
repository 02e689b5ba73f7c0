"""The 2015 TensorFlow Inception in PyTorch, whose 2048 features define the FID. It is not torchvision's inception_v3.

The blocks are torch-fidelity's. The weights are a file of the user's: torch-fidelity's or pytorch-fid's .pth, or .safetensors.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from stepdistill.errors import UserError

WEIGHTS_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
SHA256_PREFIX = "6726825d"
"""First digits of the SHA-256 of the file that torch-fidelity and pytorch-fid both publish."""
WEIGHT_FILES = (
    "weights-inception-2015-12-05-6726825d.pth",
    "pt_inception-2015-12-05-6726825d.pth",
    "inception-2015-12-05.safetensors",
)


def inception_layers() -> nn.Sequential:
    """Makes the network up to pool3: normalised (B, 3, 299, 299) -> (B, 2048). Keys are pytorch-fid's.

    Raises:
        UserError: torch-fidelity is not installed.
    """
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as blocks
    except ImportError:
        raise UserError("the Inception network needs torch-fidelity: pip install 'stepdistill[evaluation]'") from None
    layers: list[tuple[str, nn.Module]] = [
        ("Conv2d_1a_3x3", blocks.BasicConv2d(3, 32, kernel_size=3, stride=2)),
        ("Conv2d_2a_3x3", blocks.BasicConv2d(32, 32, kernel_size=3)),
        ("Conv2d_2b_3x3", blocks.BasicConv2d(32, 64, kernel_size=3, padding=1)),
        ("MaxPool_1", nn.MaxPool2d(3, 2)),
        ("Conv2d_3b_1x1", blocks.BasicConv2d(64, 80, kernel_size=1)),
        ("Conv2d_4a_3x3", blocks.BasicConv2d(80, 192, kernel_size=3)),
        ("MaxPool_2", nn.MaxPool2d(3, 2)),
        ("Mixed_5b", blocks.InceptionA(192, pool_features=32)),
        ("Mixed_5c", blocks.InceptionA(256, pool_features=64)),
        ("Mixed_5d", blocks.InceptionA(288, pool_features=64)),
        ("Mixed_6a", blocks.InceptionB(288)),
        ("Mixed_6b", blocks.InceptionC(768, channels_7x7=128)),
        ("Mixed_6c", blocks.InceptionC(768, channels_7x7=160)),
        ("Mixed_6d", blocks.InceptionC(768, channels_7x7=160)),
        ("Mixed_6e", blocks.InceptionC(768, channels_7x7=192)),
        ("Mixed_7a", blocks.InceptionD(768)),
        ("Mixed_7b", blocks.InceptionE_1(1280)),
        ("Mixed_7c", blocks.InceptionE_2(2048)),
        ("AvgPool", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
    ]
    network = nn.Sequential()
    for name, layer in layers:
        network.add_module(name, layer)
    return network


def load_inception(path: Path) -> nn.Module:
    """Loads the network with the weights of a file: torch-fidelity's or pytorch-fid's .pth, or .safetensors.

    Raises:
        UserError: missing, truncated, or not these weights.
    """
    if not path.is_file():
        raise UserError(f"there is no Inception weight file {str(path)!r}: give {WEIGHT_FILES[0]}")
    try:
        if _is_torchscript(path):
            raise UserError(
                f"{str(path)!r} is a TorchScript file, which is a program that would run here: give the same weights as "
                f"{WEIGHT_FILES[0]} (torch-fidelity), or as a .safetensors file"
            )
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except UserError:
        raise
    except Exception as error:
        # a truncated download raises another exception in every version of torch
        raise UserError(
            f"the Inception weights {str(path)!r} cannot be read ({type(error).__name__}; a truncated download?): fetch them again"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{str(path)!r} holds no weights by name: give torch-fidelity's or pytorch-fid's weight file")
    network = inception_layers()
    state = {key: value for key, value in state.items() if not key.startswith(("fc.", "AuxLogits."))}
    wanted = {key for key in network.state_dict() if not key.endswith("num_batches_tracked")}
    state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    if set(state) != wanted:
        odd = sorted(set(state) ^ wanted)[0]
        raise UserError(
            f"{str(path)!r} does not hold the 2015 Inception (first key that differs: {odd!r}): give torch-fidelity's or "
            "pytorch-fid's weight file, not torchvision's"
        )
    try:
        network.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise UserError(
            f"{str(path)!r} has weights of other shapes ({' '.join(str(error).split())[:120]}): fetch it again"
        ) from None
    return network.eval().requires_grad_(False)


def find_inception(cache: Path, *, download: bool) -> Path:
    """Finds the weight file in the user's caches, or downloads and checks it.

    Args:
        cache: folder that is searched first, and downloaded to.
        download: allow downloading.

    Raises:
        UserError: no such file, and downloading is off or failed.
    """
    for folder in (cache, Path(torch.hub.get_dir()) / "checkpoints"):
        for name in WEIGHT_FILES:
            if (folder / name).is_file():
                return folder / name
    if not download:
        raise UserError(
            f"the Inception weights are in neither {str(cache)!r} nor torch's hub cache, and downloading is off: give --download, or "
            f"put {WEIGHT_FILES[0]!r} there, or give its path as --features inception:PATH"
        )
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / WEIGHT_FILES[0]
    try:
        # writes to a temporary file, checks the SHA-256 prefix and renames
        torch.hub.download_url_to_file(WEIGHTS_URL, str(target), hash_prefix=SHA256_PREFIX, progress=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"the Inception weights could not be fetched ({error}): put {WEIGHT_FILES[0]!r} into {str(cache)!r} by hand"
        ) from None
    return target


def _is_torchscript(path: Path) -> bool:
    """Returns whether a file is a TorchScript archive, which holds code beside the tensors; `torch.save` archives do not."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())
