import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from micro_dit.data import inspect
from micro_dit.data.preparation.journal import Journal, PartReport
from micro_dit.data.shards import Record, Tally, record_fields
from micro_dit.encoders import image
from micro_dit.encoders.info import ImageEncoderInfo
from micro_dit.errors import UserError
from tests.helpers import tiny

VAE = ImageEncoderInfo("flat", "0123", channels=3, downsample=8)
REJECTS = [("a", "image is too small"), ("b", "no caption"), ("c", "image is too small")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Writes a folder of eleven gray images, from black to white, and three dropped inputs."""
    dropped = {"image is too small": Tally(2, ["a", "c"]), "no caption": Tally(1, ["b"])}
    altered = {"caption was cut to 4 tokens": Tally(7, list("abcdefg"))}
    manifest = tiny.make_manifest(
        (64, 128), VAE, dropped=dropped, altered=altered, source="colors", attribution="nobody, CC0",
        caption_cleaning="deepfloyd-2",
    )  # fmt: skip

    def record(number: int) -> Record:
        level = number / 5 - 1
        arrays = {f.name: np.full(f.shape_in(1), 0 if "_std_" in f.name else level) for f in manifest.fields}
        return Record(str(number), (f"gray number {number}",), arrays)

    splits = {"train": [record(number) for number in range(11)], "validation": []}
    folder = tiny.write_folder(tmp_path / "colors", manifest, splits)
    lines = [{"id": id, "split": "train", "part": "slice-00000", "reason": reason} for id, reason in REJECTS]
    (folder / "rejects.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(autouse=True)
def encoder(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the encoder by one that decodes a latent to 8×8 pixels of its color; returns the loaded names."""
    names: list[str] = []

    def load(name: str) -> SimpleNamespace:
        names.append(name)
        decode = lambda latents: latents.repeat(8, 1).repeat(8, 2)  # noqa: E731
        return SimpleNamespace(fingerprint="ffff" if name == "other" else "0123", decode=decode)

    monkeypatch.setattr(image, "load_image_encoder", load)
    return names


def run(*argv: str, monkeypatch: pytest.MonkeyPatch, **flags: Any) -> None:
    defaults = dict(verify=False, sheet=None, images=24, split="train", vae=None, sigma_data=0.9)
    monkeypatch.setattr(inspect.flags, "FLAGS", SimpleNamespace(**defaults | flags))
    inspect.main(["inspect", *argv])


def test_valid_folder_is_described(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run(str(folder), monkeypatch=monkeypatch, verify=True)
    lines = capsys.readouterr().out.splitlines()
    rows = [re.split(r" {2,}", line.strip(), maxsplit=1) for line in lines]
    assert ["source", "colors"] in rows
    assert ["attribution", "nobody, CC0"] in rows
    assert ["image encoder", "flat (0123), 3 channels, 8 px per latent"] in rows
    assert ["text encoder", "noise (4567), 4 tokens of 12 channels"] in rows
    assert ["captions", "cleaning: deepfloyd-2"] in rows
    assert ["inputs", "14 seen, 11 kept, 3 dropped"] in rows
    assert ["dropped", "2: image is too small: a, c"] in rows
    assert ["altered", "7: caption was cut to 4 tokens: a, b, c, d, e, …"] in rows
    assert any(name == "split train" and value.startswith("records 11, files 1, ") for name, value in rows)
    assert ["split validation", "records 0, files 0, 0.0 MB"] in rows
    # Levels -1, -0.8, … 1 have a standard deviation of √0.4.
    assert ["latents, 64 px", "mean_std, std 0.632, 0.70 × sigma_data 0.9: OK"] in rows
    assert ["std by channel", "0.632 0.632 0.632"] in rows
    assert lines[-1] == "The checksums of all files match the manifest."


def test_mismatched_latent_scale_is_reported(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run(str(folder), monkeypatch=monkeypatch, sigma_data=2.0)
    assert "0.32 × sigma_data 2: differs by more than a factor of 2" in capsys.readouterr().out


def test_checksums_detect_damage(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    (file,) = folder.glob("train-*.array_record")
    data = bytearray(file.read_bytes())
    data[data.index(b"gray number 3")] ^= 1
    file.write_bytes(data)
    run(str(folder), monkeypatch=monkeypatch)  # the size is correct
    assert "The sizes and record counts of all files match the manifest." in capsys.readouterr().out
    with pytest.raises(UserError, match=rf"The shard {file} has changed"):
        run(str(folder), monkeypatch=monkeypatch, verify=True)
    file.unlink()
    with pytest.raises(UserError, match=rf"The shard {file} is missing"):
        run(str(folder), monkeypatch=monkeypatch)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"Cannot read .*rejects\.jsonl"),
        ("{", r"Cannot read .*rejects\.jsonl"),
        ('{"id": "a"}\n', r"Cannot read .*rejects\.jsonl"),
        ('{"id": "a", "reason": "no caption"}\n', r"lists 0 inputs .* 'image is too small', but the manifest counts 2"),
        ("drop the last", r"lists 1 inputs .* 'image is too small', but the manifest counts 2"),
    ],
)
def test_inconsistent_rejects_raise_a_user_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, message: str
) -> None:
    path = folder / "rejects.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.unlink()
    if text is not None:
        path.write_text("".join(lines[:-1]) if text == "drop the last" else text)
    run(str(folder), monkeypatch=monkeypatch)
    with pytest.raises(UserError, match=message):
        run(str(folder), monkeypatch=monkeypatch, verify=True)


def test_contact_sheet_shows_decoded_latents(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, encoder: list[str]
) -> None:
    run(str(folder), monkeypatch=monkeypatch, sheet=str(tmp_path / "sheet.png"), images=9)
    assert f"Wrote 9 images of split train to {tmp_path / 'sheet.png'}." in capsys.readouterr().out
    assert encoder == ["flat"]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.text["attribution"] == "nobody, CC0"
        found = np.asarray(sheet)
    pixels = found.reshape(-1, 3)
    tile = 128 * 128  # 64 px images are shown at twice their size
    for number in range(9):
        gray = round((number / 5 - 1 + 1) * 127.5)
        assert np.sum(np.all(np.abs(pixels.astype(int) - gray) <= 1, axis=1)) >= tile, number
    run(str(folder), monkeypatch=monkeypatch, sheet=str(tmp_path / "sheet.png"), vae="copy/of/it")
    assert encoder == ["flat", "copy/of/it"]
    with pytest.raises(UserError, match=r"flat \(fingerprint 0123\), but other has fingerprint ffff\. Set --vae"):
        run(str(folder), monkeypatch=monkeypatch, sheet=str(tmp_path / "sheet.png"), vae="other")


def test_unfinished_folder_reports_its_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    parts = {"train": ["slice-00000", "slice-00001", "slice-00002"], "validation": ["slice-00000"]}
    journal = Journal(tmp_path / "unfinished", {"source": "colors"}, parts)
    journal.finish_part(PartReport("train", 0, "slice-00000"))
    journal.finish_part(PartReport("train", 2, "slice-00002"))
    run(str(tmp_path / "unfinished"), monkeypatch=monkeypatch)
    out = capsys.readouterr().out.splitlines()
    assert "unfinished is unfinished: it has no manifest.json" in out[0]
    assert out[1:] == ["split train: 2 of 3 parts done", "split validation: 0 of 1 parts done"]
    (tmp_path / "unfinished" / "plan.json").write_text("{}")
    with pytest.raises(UserError, match=r"plan\.json is damaged"):
        run(str(tmp_path / "unfinished"), monkeypatch=monkeypatch)


def test_command_line(folder: Path, tmp_path: Path) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "micro_dit.data.inspect", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent.parent)

    good = call(str(folder), "--verify")
    assert good.returncode == 0, good.stderr
    assert "The checksums of all files match the manifest." in good.stdout
    missing = call(str(tmp_path / "nowhere"))
    assert missing.returncode == 1
    assert missing.stderr.count("\n") == 1
    assert "No shards at" in missing.stderr
    assert "Pass exactly one folder of shards" in call().stderr


def test_fields_are_listed() -> None:
    manifest = tiny.make_manifest((64,), VAE, statistics={"64": {"mean": [0.0] * 3, "std": [1.0] * 3}})
    text = inspect.describe(manifest, 0.9)
    for field in record_fields((64,), "mean_std", VAE, tiny.TEXT):
        assert f"{field.name} float16 {field.shape}" in text
