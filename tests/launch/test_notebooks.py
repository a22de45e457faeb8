"""The notebooks run and display images; their committed outputs are small and contain no local paths."""

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
IMAGES = {"colab_tpu_demo": 3, "colab_sample_released": 1, "colab_how_masking_works": 4}  # images in the outputs
NOTEBOOKS = {path.stem: path for path in (ROOT / "launch").glob("*.ipynb")}


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def images(notebook: Any) -> list[np.ndarray]:
    found = [output["data"]["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for data in found]


def texts(notebook: Any) -> list[str]:
    """Returns sources and text outputs of all cells, without encoded images."""
    printed = [output.get("text", "") for output in outputs(notebook)]
    shown = [data for o in outputs(notebook) for kind, data in o.get("data", {}).items() if kind.startswith("text/")]
    return [cell.source for cell in notebook.cells] + printed + shown


@pytest.mark.parametrize("name", sorted(IMAGES))
def test_notebook_runs_and_displays_images(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICRO_DIT_SMALL", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOKS[name], 4)
    nbclient.NotebookClient(notebook, timeout=400, resources={"metadata": {"path": tmp_path}}).execute()
    found = images(notebook)
    assert len(found) == IMAGES[name]
    assert all(image.std() > 5 for image in found)  # not blank


@pytest.mark.parametrize("name", sorted(IMAGES))
def test_committed_outputs_are_small_and_contain_no_local_paths(name: str) -> None:
    assert set(NOTEBOOKS) == set(IMAGES)
    assert NOTEBOOKS[name].stat().st_size < 300_000
    notebook = nbformat.read(NOTEBOOKS[name], 4)
    for text in texts(notebook):
        assert not re.search(r"(?<![\w.:/<*)\]}])/\w+/\w+", text), text  # an absolute path
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert len(images(notebook)) == IMAGES[name]


@pytest.mark.parametrize("name", sorted(IMAGES))
def test_notebook_is_compatible_with_colab(name: str) -> None:
    """Checks that it prints package versions first, pins no versions, and does not use TensorFlow."""
    cells = [cell.source for cell in nbformat.read(NOTEBOOKS[name], 4).cells if cell.cell_type == "code"]
    assert "SMALL = bool(os.environ" in cells[0]
    assert "print(name, version(name))" in cells[1]
    (listed,) = re.findall(r"packages = \[(.*?)\]", cells[0], re.DOTALL)
    packages = re.findall('"(.*?)"', listed)
    assert all(re.fullmatch(r"[\w-]+", package) for package in packages)  # without versions
    assert not {"jax", "torch", "numpy"} & set(packages)
    assert not re.search("tensorflow|drive.mount", "".join(cells), re.IGNORECASE)
