"""The command, Python, the web page and a notebook sample the same image for the same prompt and seed."""

import base64
import dataclasses
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from micro_dit.api import load
from micro_dit.encoders.info import UNVERIFIED
from micro_dit.playground import __main__ as playground
from micro_dit.playground.session import Session
from micro_dit.training.checkpoint import Checkpoints
from micro_dit.training.state import TrainState
from tests.helpers import tiny

ROOT = Path(__file__).parent.parent
PROMPT, SEED, STEPS, GUIDANCE = "grinning cat", 7, 3, 2.5


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a run with a tiny network and random weights, for the demo's encoders."""
    path = tmp_path_factory.mktemp("four_ways") / "run"
    config = tiny.network(in_channels=8, caption_channels=384)
    params = tiny.random_params(config)
    checkpoints = Checkpoints(path)
    state = TrainState(jnp.asarray(5, jnp.int32), params, {"count": jnp.asarray(5)}, tiny.random_params(config, seed=1))
    meta = {"step": 5, "phase": 0, "model": dataclasses.asdict(config)}
    checkpoints.save(state, meta, wait=True)
    checkpoints.close()
    run = tiny.get_config("shards").to_dict()
    run["data"].update(vae="openmoji_vae", text_encoder="minilm")
    shards = dict(vae=UNVERIFIED, text_encoder=UNVERIFIED, caption_tokens=16, caption_cleaning="deepfloyd-2")
    (path / "config.json").write_text(json.dumps({"config": run, "shards": shards}))
    return path


@pytest.fixture(scope="module")
def expected(workdir: Path) -> np.ndarray:
    """The image sampled in Python."""
    (image,) = load(workdir).generate(PROMPT, seed=SEED, steps=STEPS, guidance=GUIDANCE)
    assert image.size == (64, 64)
    assert np.asarray(image).std() > 1
    return np.asarray(image)


def pixels(file: object) -> np.ndarray:
    with Image.open(file) as opened:
        return np.asarray(opened.convert("RGB"))


def test_the_command_samples_the_same_image(workdir: Path, expected: np.ndarray, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "micro_dit.sample", f"--workdir={workdir}", f"--out={tmp_path / 'cat.png'}",
        f"--prompt={PROMPT}", f"--seed={SEED}", f"--steps={STEPS}", f"--guidance={GUIDANCE}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(pixels(tmp_path / "cat.png"), expected)


def test_a_notebook_samples_the_same_image(
    workdir: Path, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbclient = pytest.importorskip("nbclient", reason="running notebooks requires nbclient and ipykernel")
    pytest.importorskip("ipykernel", reason="running notebooks requires nbclient and ipykernel")
    import nbformat

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    cell = nbformat.v4.new_code_cell(
        "from micro_dit import load\n"
        f"model = load({str(workdir)!r})\n"
        f"model.generate({PROMPT!r}, seed={SEED}, steps={STEPS}, guidance={GUIDANCE})[0]"
    )
    nbclient.NotebookClient(nbformat.v4.new_notebook(cells=[cell]), timeout=300, kernel_name="python3").execute()
    (shown,) = [output.data["image/png"] for output in cell.outputs if output.output_type == "execute_result"]
    np.testing.assert_array_equal(pixels(io.BytesIO(base64.b64decode(shown))), expected)


def test_the_page_samples_the_same_image(workdir: Path, expected: np.ndarray, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="the page requires the extra `playground`")
    from gradio_client import Client

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    session = Session([workdir], tmp_path / "images")
    page = playground.build_page(session)
    url = playground.serve(page, "127.0.0.1", port, str(tmp_path))
    try:
        client = Client(url, verbose=False, analytics_enabled=False)
        settings = (PROMPT, "", SEED, STEPS, GUIDANCE, "heun", 1, next(iter(session.choices)), "none")
        _, messages, gallery = client.predict(*settings, api_name="/draw")
    finally:
        page.close()
        session.close()
    assert messages == ""
    np.testing.assert_array_equal(pixels(gallery[0]["image"]), expected)
