"""Every registered method on one tiny family, every family and variant with one method: step, resume, export, reload.

A method or family joins by being registered.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from support.method_cases import CASES, FULLEST, LAYOUTS, Bench, difference, equal, saved

import stepdistill
from stepdistill.api.training import default_export_format
from stepdistill.config.registry import family_names, load_family, method_names
from stepdistill.config.schema import RunConfig
from stepdistill.errors import UserError
from stepdistill.training.run import train

FAMILIES = [
    (name, variant) for name in family_names() for variant in load_family(name).tiny_variants if name != "analytic"
]


@pytest.fixture
def bench(tiny: Callable[..., Path], tmp_path: Path) -> Bench:
    return Bench(tiny, tmp_path)


def folder_hash(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


NO_EMBEDDING = "no embedding of a guidance scale"
"""What stock pipelines of SD3 and Sana have no place for, in words of the refusal."""
UNTOLD = {"guidance": "guidance-fixed", "lcm": "lcm"}
"""Method whose fullest case is told w by an embedding -> the case that goes through in its place."""
ONE_WAY = "re-noises after every step"
"""Of Sana-Sprint's, which has one way to sample."""


def through(bench: Bench, tmp_path: Path, case: str, family: str, variant: str, layout: str) -> None:
    def make(steps: int) -> RunConfig:
        return bench.config(
            CASES[case], steps, family=family, variant=variant, layout=layout, dtype="float32", batch_size=2,
            gradient_checkpointing=True,
        )  # fmt: skip

    base = folder_hash(Path(make(1).model.path))
    train(make(3), tmp_path / "whole")
    train(make(2), tmp_path / "broken")
    train(make(3), tmp_path / "broken", resume="latest")
    whole = saved(tmp_path / "whole")
    assert equal(whole, saved(tmp_path / "broken"))
    assert all(bool(tensor.isfinite().all()) for group in whole.values() for tensor in group.values())
    exported = stepdistill.export(tmp_path / "whole", default_export_format(make(1)), tmp_path / "export")
    with safe_open(exported / "proof.safetensors", "pt") as proof:
        assert len(list(proof.keys())) > 0
    assert (tmp_path / "whole/grids/step-00000003.png").is_file()
    assert folder_hash(Path(make(1).model.path)) == base


@pytest.mark.parametrize("method", method_names())
def test_every_method_on_sd(bench: Bench, tmp_path: Path, method: str) -> None:
    through(bench, tmp_path, FULLEST[method], "sd", "default", "lora")


# sd-default is in test_every_method_on_sd already
@pytest.mark.parametrize(("family", "variant"), [pair for pair in FAMILIES if pair != ("sd", "default")])
def test_every_family_with_dmd2(bench: Bench, tmp_path: Path, family: str, variant: str) -> None:
    through(bench, tmp_path, FULLEST["dmd2"], family, variant, "mixed" if variant == "v" else "lora")


@pytest.mark.slow
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize(("family", "variant"), FAMILIES)
@pytest.mark.parametrize("method", method_names())
def test_the_whole_matrix(bench: Bench, tmp_path: Path, method: str, family: str, variant: str, layout: str) -> None:
    try:
        through(bench, tmp_path, FULLEST[method], family, variant, layout)
    except UserError as refusal:
        assert not (tmp_path / "whole").exists()
        words = str(refusal)
        untold = UNTOLD.get(method) if family in ("sd3", "sana") and NO_EMBEDDING in words else None
        assert untold is not None or (variant == "sprint" and ONE_WAY in words), refusal  # noqa: PT017
        if untold is not None:
            through(bench, tmp_path, untold, family, variant, layout)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_every_case_on_a_gpu(bench: Bench, tmp_path: Path, name: str, dtype: str) -> None:
    """Broken off and resumed it does what it does whole, to what the order of a GPU's sums leaves open."""
    make = lambda steps: bench.config(  # noqa: E731
        CASES[name], steps, family="sd", dtype=dtype, batch_size=2, gradient_checkpointing=True, device="cuda"
    )
    train(make(3), tmp_path / "whole")
    train(make(2), tmp_path / "broken")
    train(make(3), tmp_path / "broken", resume="latest")
    whole, broken = saved(tmp_path / "whole"), saved(tmp_path / "broken")
    assert all(bool(tensor.isfinite().all()) for group in whole.values() for tensor in group.values())
    # two updates of Adam at a rate of 1e-3 move a weight by 2e-3 at most; what rounding turns round moves the other way
    assert difference(whole, broken) < 4e-3
    assert (tmp_path / "whole/grids/step-00000003.png").is_file()


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "variant"), FAMILIES)
def test_every_family_on_a_gpu(bench: Bench, tmp_path: Path, family: str, variant: str) -> None:
    """Trained in bfloat16 on the device, exported there, loaded by stock diffusers, which the proof compares."""
    config = bench.config(
        CASES["dmd2"], 3, family=family, variant=variant, dtype="bfloat16", batch_size=2, device="cuda"
    )
    train(config, tmp_path / "run")
    exported = stepdistill.export(tmp_path / "run", "diffusers-lora", tmp_path / "export", device="cuda")
    with safe_open(exported / "proof.safetensors", "pt") as proof:
        assert len(list(proof.keys())) > 0
