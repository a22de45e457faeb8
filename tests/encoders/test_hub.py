import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants, errors

from micro_dit.encoders.hub import ASSETS, resolve_folder, resolve_weights
from micro_dit.encoders.image import load_image_encoder
from micro_dit.encoders.text import load_text_encoder
from micro_dit.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the folder of an empty Hub cache; the Hub's library is in offline mode."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def cached(cache: Path, repository: str) -> Path:
    """Creates a repository in the Hub's cache and returns the folder for its files."""
    root = cache / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    (root / "snapshots" / COMMIT).mkdir(parents=True)
    return root / "snapshots" / COMMIT


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Replaces downloads; returns a list to which each requested repository and its patterns are appended."""
    calls: list[tuple[str, list[str]]] = []

    def download(repository: str, allow_patterns: list[str]) -> str:
        calls.append((repository, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def test_local_and_included_folders_are_not_downloaded(asked: list, tmp_path: Path) -> None:
    assert resolve_folder(str(tmp_path), ["config.json"]) == tmp_path
    assert resolve_folder("openmoji_vae", ["config.json"]) == ASSETS / "openmoji_vae"
    assert load_image_encoder("openmoji_vae").name == "openmoji_vae"
    assert not asked


def test_resolves_repositories_and_folders_in_them(asked: list, tmp_path: Path) -> None:
    assert resolve_folder("owner/some.repo-1", ["config.json", "vae/config.json"]) == tmp_path
    assert resolve_folder("owner/repo/text_encoder_2", ["model.safetensors", "../tokenizer*/vocab.json"]) == (
        tmp_path / "text_encoder_2"
    )
    resolve_folder("owner/repo", ["config.json", "../tokenizer*/vocab.json"])
    assert asked == [
        ("owner/some.repo-1", ["config.json", "vae/config.json"]),
        ("owner/repo", ["text_encoder_2/model.safetensors", "tokenizer*/vocab.json"]),
        ("owner/repo", ["config.json"]),
    ]


@pytest.mark.parametrize("pattern", ["*", "*.bin", "pytorch_model.pt", "weights.pickle", "vae/*"])
def test_never_downloads_pickles(asked: list, pattern: str) -> None:
    with pytest.raises(ValueError, match="may match files other than"):
        resolve_folder("owner/repo", [pattern])
    assert not asked


@pytest.mark.parametrize("name", ["nothing", "/no/such/folder", "./missing/vae", "~/missing", "owner/re po", " "])
def test_rejects_names_of_neither_folders_nor_repositories(asked: list, name: str) -> None:
    with pytest.raises(UserError, match=r"is not a folder\. Pass an existing folder, or owner/repository"):
        resolve_folder(name, ["config.json"])
    with pytest.raises(UserError, match=r"Remove the '\.\.'"):
        resolve_folder("owner/repo/../other", ["config.json"])
    assert not asked


def download_message(error: type[Exception], monkeypatch: pytest.MonkeyPatch, status: int = 404) -> str:
    """Returns the message of the UserError if the Hub's library raises `error`."""

    response = SimpleNamespace(status_code=status, headers={}, request=None)

    def download(repository: str, allow_patterns: list[str]) -> str:
        raise error("no\nluck", response=response) if issubclass(error, errors.HfHubHTTPError) else error("no\nluck")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError) as caught:
        resolve_folder("owner/repo", ["config.json"])
    assert "owner/repo" in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_hub_errors_are_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    unreachable = "cannot be reached, and its local cache lacks"
    assert "is gated. Accept its terms" in download_message(errors.GatedRepoError, monkeypatch, 403)
    assert "nor a repository on the" in download_message(errors.RepositoryNotFoundError, monkeypatch)
    assert unreachable in download_message(errors.LocalEntryNotFoundError, monkeypatch)
    assert "failed (no). Run the command again" in download_message(errors.HfHubHTTPError, monkeypatch, 500)
    assert "failed (no). Run the command again" in download_message(ConnectionError, monkeypatch)
    assert "failed (no). Run the command again" in download_message(errors.HTTPError, monkeypatch)
    assert "nor a valid repository name" in download_message(errors.HFValidationError, monkeypatch)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        resolve_folder("owner/repo", ["config.json"])


def test_uses_the_cache_without_a_network(cache: Path) -> None:
    with pytest.raises(UserError, match="cannot be reached, and its local cache lacks"):
        load_image_encoder("owner/pipeline")
    vae = cached(cache, "owner/pipeline") / "vae"
    vae.mkdir()
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        (vae / file).write_bytes((ASSETS / "openmoji_vae" / file).read_bytes())
    shipped = load_image_encoder("openmoji_vae")
    for name in ("owner/pipeline", "owner/pipeline/vae"):
        encoder = load_image_encoder(name)
        assert (encoder.name, encoder.fingerprint) == (name, shipped.fingerprint)


def test_finds_text_encoders_in_the_cache(cache: Path) -> None:
    pytest.importorskip("torch")
    from tests.helpers.published import write_clip, write_open_clip

    pipeline = cached(cache, "owner/pipeline")
    reference = write_clip(pipeline / "text_encoder_2", tokenizer=pipeline / "tokenizer_2")
    write_open_clip(cached(cache, "owner/open"), reference)
    encoder = load_text_encoder("owner/pipeline/text_encoder_2", 20)
    opened = load_text_encoder("owner/open", 20)
    assert (encoder.name, opened.name) == ("owner/pipeline/text_encoder_2", "owner/open")
    # Compares only the caption's tokens, since the padding differs.
    np.testing.assert_allclose(encoder.encode(["a photo"])[0, :4], opened.encode(["a photo"])[0, :4], atol=1e-5)


def test_downloads_only_the_weights_that_it_uses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def download(repository: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        if allow_patterns == ["b-*.safetensors"]:
            (tmp_path / "b-1.safetensors").touch()
            (tmp_path / "b-2.safetensors").touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    files = resolve_weights("owner/repo", ["a.safetensors", "b-*.safetensors", "c.safetensors"])
    assert [file.name for file in files] == ["b-1.safetensors", "b-2.safetensors"]
    assert asked == ["a.safetensors", "b-*.safetensors"]
    with pytest.raises(UserError, match=r"no file named c\.safetensors.*convert_weights FILE FOLDER"):
        resolve_weights("owner/repo", ["c.safetensors"])


def test_message_for_a_repository_without_safetensors_names_the_conversion(cache: Path) -> None:
    pickled = cached(cache, "owner/pickled")
    (pickled / "open_clip_config.json").write_text(json.dumps({"model_cfg": {}}))
    with pytest.raises(UserError, match=r"'owner/pickled' has no file named open_clip_model.*convert_weights"):
        load_text_encoder("owner/pickled")
    (pickled / "config.json").write_bytes((ASSETS / "openmoji_vae" / "config.json").read_bytes())
    with pytest.raises(UserError, match="convert_weights"):
        load_image_encoder("owner/pickled")


def test_imports_the_hub_library_lazily() -> None:
    code = "import sys, micro_dit.encoders.image, micro_dit.encoders.text; print('huggingface_hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
