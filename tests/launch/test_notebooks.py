"""The notebooks run from top to bottom and make pictures; what is committed of their outputs is small and readable."""

import base64
import io
import re
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
PICTURES = {"colab_tpu_demo": 3, "colab_sample_released": 1, "colab_how_masking_works": 4}
NOTEBOOKS = {path.stem: path for path in (ROOT / "launch").glob("*.ipynb")}


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def pictures(notebook: Any) -> list[np.ndarray]:
    found = [output["data"]["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for data in found]


def texts(notebook: Any) -> list[str]:
    """What the cells say and print; not pictures, whose letters may spell anything."""
    printed = [output.get("text", "") for output in outputs(notebook)]
    shown = [data for o in outputs(notebook) for kind, data in o.get("data", {}).items() if kind.startswith("text/")]
    return [cell.source for cell in notebook.cells] + printed + shown


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_a_notebook_runs_and_makes_pictures(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICRO_DIT_SMALL", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOKS[name], 4)
    nbclient.NotebookClient(notebook, timeout=400, resources={"metadata": {"path": tmp_path}}).execute()
    found = pictures(notebook)
    assert len(found) == PICTURES[name]
    assert all(picture.std() > 5 for picture in found)  # none is blank


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_committed_outputs_are_there_small_and_nobodys(name: str) -> None:
    assert set(NOTEBOOKS) == set(PICTURES)
    assert NOTEBOOKS[name].stat().st_size < 300_000
    notebook = nbformat.read(NOTEBOOKS[name], 4)
    for text in texts(notebook):
        assert not re.search(r"(?<![\w.:/<*)\]}])/\w+/\w+", text), text  # a path of somebody's machine
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert len(pictures(notebook)) == PICTURES[name]


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_a_notebook_fits_what_colab_has(name: str) -> None:
    """It prints versions before anything else, asks for none, and brings no TensorFlow."""
    cells = [cell.source for cell in nbformat.read(NOTEBOOKS[name], 4).cells if cell.cell_type == "code"]
    assert "SMALL = bool(os.environ" in cells[0]
    assert "print(name, version(name))" in cells[1]
    (listed,) = re.findall(r"packages = \[(.*?)\]", cells[0], re.DOTALL)
    packages = re.findall('"(.*?)"', listed)
    assert all(re.fullmatch(r"[\w-]+", package) for package in packages)  # without versions
    assert not {"jax", "torch", "numpy"} & set(packages)
    assert not re.search("tensorflow|drive.mount", "".join(cells), re.IGNORECASE)
