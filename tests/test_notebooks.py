"""Every notebook runs from top to bottom on a short budget: its cell tagged `parameters` is replaced, nothing else."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.ci

FOLDER = Path(__file__).parents[1] / "notebooks"
SHORT = ["training.max_steps=2", "training.batch_size=4", "training.grid_prompts=2", "training.threads=1"]
PARAMETERS = {
    "quickstart.ipynb": {"OVERRIDES": SHORT, "IMAGES": 12},
    "guidance_adapter.ipynb": {"OVERRIDES": [*SHORT, "training.log_every=1", "training.grid_every=0"], "IMAGES": 4},
    "pso_style.ipynb": {
        "DISTIL": [*SHORT, "training.grid_every=0"],
        "TUNE": ["training.max_steps=2", "training.batch_size=4", "training.threads=1", "training.log_every=1"],
        "IMAGES": 8,
    },
}


def test_every_notebook_has_its_short_parameters() -> None:
    assert {path.name for path in FOLDER.glob("*.ipynb")} == set(PARAMETERS)


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_a_notebook_runs_and_shows_its_pictures(name: str, tmp_path: Path) -> None:
    notebook = nbformat.read(FOLDER / name, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # committed without outputs
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    values = {"OUTPUT": str(tmp_path / "run"), **PARAMETERS[name]}
    parameters.source = "\n".join(f"{key} = {value!r}" for key, value in values.items())
    NotebookClient(notebook, timeout=1800, kernel_name="python3").execute()
    shown = [kind for cell in notebook.cells for output in cell.get("outputs", []) for kind in output.get("data", {})]
    assert shown.count("image/png") == 2  # pictures and losses
