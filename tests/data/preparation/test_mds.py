"""Tests the conversion of MDS latents. `tests/golden/mds` was written by mosaicml-streaming 0.13 with zstd."""

import itertools
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from micro_dit.data.preparation import mds
from micro_dit.data.preparation.mds import Layout, convert_mds, list_mds
from micro_dit.data.shard_checks import check_shards
from micro_dit.data.shards import Manifest, Record, SplitReader, read_manifest
from micro_dit.errors import UserError

GOLDEN = Path(__file__).parents[2] / "golden" / "mds"
COLUMNS = {"caption": "str", "caption_latents": "bytes", "latents_256": "bytes", "latents_512": "bytes"}


def pattern(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the values of an array of a golden sample."""
    return ((np.arange(np.prod(shape)) * 5 + seed * 11) % 127 / 32 - 2).astype(np.float16).reshape(shape)


def make_sample(seed: int, channels: int = 4, caption: tuple[int, int] = (77, 1024)) -> dict[str, bytes]:
    return {
        "caption": f"Photo &amp; Caption №{seed}".encode(),
        "caption_latents": pattern(seed, caption).tobytes(),
        "latents_256": pattern(seed + 1, (channels, 32, 32)).tobytes(),
        "latents_512": pattern(seed + 2, (channels, 64, 64)).tobytes(),
    }


def encode_file(samples: list[dict[str, bytes]], description: dict) -> bytes:
    """Serializes samples in the file format of MDSWriter."""
    text = json.dumps(description, sort_keys=True).encode()
    bodies = []
    for sample in samples:
        columns = [sample[name] for name in description["column_names"]]
        bodies.append(np.array([len(column) for column in columns], "<u4").tobytes() + b"".join(columns))
    first = 4 + 4 * (len(samples) + 1) + len(text)
    offsets = list(itertools.accumulate((len(body) for body in bodies), initial=first))
    return np.array([len(samples), *offsets], "<u4").tobytes() + text + b"".join(bodies)


def write_mds(folder: Path, files: list[list[dict[str, bytes]]], compression: str | None = None) -> Path:
    """Writes a folder of MDS files and its index."""
    folder.mkdir(parents=True)
    shards = []
    for index, samples in enumerate(files):
        names = sorted(samples[0])
        description = {
            "version": 2, "format": "mds", "compression": compression, "hashes": [], "size_limit": 1 << 19,
            "column_names": names, "column_encodings": [COLUMNS[name] for name in names],
            "column_sizes": [None] * len(names),
        }  # fmt: skip
        raw, name = encode_file(samples, description), f"shard.{index:05d}.mds"
        packed = zstandard.compress(raw, 7) if compression else None
        shards.append(
            description
            | {
                "samples": len(samples),
                "raw_data": {"basename": name, "bytes": len(raw), "hashes": {}},
                "zip_data": packed and {"basename": f"{name}.zstd", "bytes": len(packed), "hashes": {}},
            }
        )
        (folder / (f"{name}.zstd" if packed else name)).write_bytes(packed or raw)
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    return folder


def convert(folder: Path, out: Path, **arguments: Any) -> Manifest | None:
    names = {"vae": "stabilityai/stable-diffusion-xl-base-1.0", "text_encoder": "apple/DFN5B-CLIP-ViT-H-14-378"}
    return convert_mds(str(folder), str(out), **names | {"report": lambda line: None} | arguments)


def read_all(out: Path) -> list[Record]:
    manifest = read_manifest(out)
    check_shards(manifest, out, checksums=True)
    reader = SplitReader(out, manifest, "train")
    return [reader[index] for index in range(len(reader))]


def assert_sample(record: Record, seed: int) -> None:
    """Asserts that a record is bitwise equal to the output of `make_sample`."""
    assert record.captions == (f"photo caption №{seed}",)
    assert (record.arrays["caption_embedding"] == pattern(seed, (77, 1024))[None]).all()
    assert (record.arrays["latent_sample_256"] == pattern(seed + 1, (4, 32, 32)).transpose(1, 2, 0)).all()
    assert (record.arrays["latent_sample_512"] == pattern(seed + 2, (4, 64, 64)).transpose(1, 2, 0)).all()


def rejects_of(out: Path) -> dict[str, str]:
    lines = (out / "rejects.jsonl").read_text(encoding="utf-8").splitlines()
    return {reject["id"]: reject["reason"] for reject in map(json.loads, lines)}


def test_golden_files(tmp_path: Path) -> None:
    """Three files that are listed in the indexes of their folders and in the merged index contain five records."""
    manifest = convert(GOLDEN, tmp_path / "out")
    records = read_all(tmp_path / "out")
    names = ["0/shard.00000.mds:0", "0/shard.00000.mds:1", "0/shard.00001.mds:0", "1/shard.00000.mds:0"]
    assert [record.id for record in records] == [*names, "1/shard.00000.mds:1"]
    for seed, record in enumerate(records):
        assert_sample(record, seed)
    assert manifest == read_manifest(tmp_path / "out")
    assert (manifest.source, manifest.posterior, manifest.resolutions) == ("mds", "sample", (256, 512))
    assert manifest.caption_cleaning == "deepfloyd-2"
    assert (manifest.vae.channels, manifest.vae.downsample, manifest.vae.fingerprint) == (4, 8, "unverified")
    assert (manifest.text_encoder.tokens, manifest.text_encoder.channels) == (77, 1024)
    stored = np.stack([pattern(seed + 1, (4, 32, 32)) for seed in range(5)]).astype(np.float64)
    np.testing.assert_allclose(manifest.statistics["256"]["mean"], stored.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(manifest.statistics["256"]["std"], stored.std((0, 2, 3)), rtol=1e-9)


def test_encode_file_matches_the_golden_files(tmp_path: Path) -> None:
    """The output of `encode_file` must be identical to that of MDSWriter."""
    entries = json.loads((GOLDEN / "index.json").read_text())["shards"]
    seeds = iter(range(5))
    for entry in entries:
        description = {key: value for key, value in entry.items() if key not in ("raw_data", "zip_data", "samples")}
        packed = (GOLDEN / entry["zip_data"]["basename"]).read_bytes()
        samples = [make_sample(next(seeds)) for _ in range(entry["samples"])]
        assert encode_file(samples, description) == zstandard.decompress(packed, entry["raw_data"]["bytes"])


@pytest.mark.parametrize("compression", [None, "zstd", "zstd:7"])
def test_files_written_by_mosaicml_streaming(tmp_path: Path, compression: str | None) -> None:
    streaming = pytest.importorskip("streaming", reason="mosaicml-streaming is not installed; see test_golden_files")
    rng = np.random.default_rng(0)
    samples = []
    for folder in ("0", "1"):
        arguments = {"out": str(tmp_path / "mds" / folder), "compression": compression, "size_limit": 1 << 19}
        with streaming.MDSWriter(columns=COLUMNS, **arguments) as writer:
            for _ in range(3):
                sample = {
                    "caption": "été", "caption_latents": rng.standard_normal((77, 1024)).astype(np.float16).tobytes(),
                    "latents_256": rng.standard_normal((16, 32, 32)).astype(np.float16).tobytes(),
                    "latents_512": rng.standard_normal((16, 64, 64)).astype(np.float16).tobytes(),
                }  # fmt: skip
                writer.write(sample)
                samples.append(sample)
    convert(tmp_path / "mds", tmp_path / "out")
    for record, sample in zip(read_all(tmp_path / "out"), samples, strict=True):
        assert record.arrays["caption_embedding"].tobytes() == sample["caption_latents"]
        for side in ("256", "512"):
            assert record.arrays[f"latent_sample_{side}"].transpose(2, 0, 1).tobytes() == sample[f"latents_{side}"]


def test_uncompressed_files_are_preferred(tmp_path: Path) -> None:
    folder = write_mds(tmp_path / "mds", [[make_sample(0), make_sample(1)], [make_sample(2)]], "zstd")
    raw = folder / "shard.00001.mds"
    raw.write_bytes(zstandard.decompress(raw.with_suffix(".mds.zstd").read_bytes(), 1 << 20))
    raw.with_suffix(".mds.zstd").unlink()  # the package keeps either or both
    convert(folder, tmp_path / "out")
    plain = write_mds(tmp_path / "plain", [[make_sample(0), make_sample(1)], [make_sample(2)]])
    convert(plain, tmp_path / "out_plain")
    for out in ("out", "out_plain"):
        for seed, record in enumerate(read_all(tmp_path / out)):
            assert_sample(record, seed)


def test_error_names_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UserError, match="pip install zstandard"):
        convert(GOLDEN, tmp_path / "out")


def test_selected_resolutions(tmp_path: Path) -> None:
    assert convert(GOLDEN, tmp_path / "a", resolutions=[512]).resolutions == (512,)
    sample = make_sample(0)
    del sample["latents_512"]
    folder = write_mds(tmp_path / "mds", [[sample]])
    assert convert(folder, tmp_path / "b").resolutions == (256,)
    with pytest.raises(UserError, match="no column latents_512; its columns are caption, caption_latents, latents_256"):
        convert(folder, tmp_path / "c", resolutions=[256, 512])


def test_sixteen_channels_and_t5_embeddings(tmp_path: Path) -> None:
    folder = write_mds(tmp_path / "mds", [[make_sample(0, channels=16, caption=(120, 4096))]])
    manifest = convert(folder, tmp_path / "out")
    assert manifest.vae.channels == 16
    assert (manifest.text_encoder.tokens, manifest.text_encoder.channels) == (120, 4096)


def test_unusable_samples_are_counted_and_named(tmp_path: Path) -> None:
    samples = [make_sample(seed) for seed in range(6)]
    samples[1]["latents_256"] = samples[1]["latents_256"][:-2]
    samples[2]["caption"] = b"caf\xe9"
    samples[3]["latents_512"] = b"\x00\x7c" + samples[3]["latents_512"][2:]  # infinity
    samples[4]["caption"] = b"photo.jpg"
    folder = write_mds(tmp_path / "mds", [samples])
    manifest = convert(folder, tmp_path / "out")
    assert [record.id for record in read_all(tmp_path / "out")] == [f"shard.00000.mds:{index}" for index in (0, 4, 5)]
    assert rejects_of(tmp_path / "out") == {
        "shard.00000.mds:1": mds.WRONG_SIZE,
        "shard.00000.mds:2": mds.NOT_UTF8,
        "shard.00000.mds:3": mds.NOT_FINITE,
    }
    assert {reason: tally.count for reason, tally in manifest.dropped.items()} == dict.fromkeys(
        (mds.WRONG_SIZE, mds.NOT_UTF8, mds.NOT_FINITE), 1
    )
    assert {reason: tally.ids for reason, tally in manifest.altered.items()} == {
        mds.EMPTY_CAPTION: ["shard.00000.mds:4"]
    }


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("kept", [0.0, 0.00002, 0.5, 0.9999])
def test_truncated_file(tmp_path: Path, compression: str | None, kept: int) -> None:
    rng = np.random.default_rng(1)  # incompressible, so that half of the file is half of the samples
    samples = [
        make_sample(seed) | {"latents_512": rng.standard_normal(4 * 64 * 64).astype("<f2").tobytes()}
        for seed in range(5)
    ]
    folder = write_mds(tmp_path / "mds", [samples, [make_sample(9)]], compression)
    path = folder / ("shard.00000.mds" + (".zstd" if compression else ""))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    manifest = convert(folder, tmp_path / "out")
    records, rejects = read_all(tmp_path / "out"), rejects_of(tmp_path / "out")
    assert len(records) + len(rejects) == 6
    assert set(rejects.values()) == {mds.DAMAGED}
    assert manifest.dropped[mds.DAMAGED].count == len(rejects) >= (1 if kept > 0.9 else 3)
    assert (len(rejects) == 5) == (kept < 0.5)
    assert_sample(records[-1], 9)
    for record, sample in zip(records[:-1], samples, strict=False):
        assert record.arrays["latent_sample_512"].transpose(2, 0, 1).tobytes() == sample["latents_512"]


def test_damaged_offsets_and_sizes(tmp_path: Path) -> None:
    """Invalid offsets and inconsistent sizes must drop only the affected samples."""
    folder = write_mds(tmp_path / "mds", [[make_sample(seed) for seed in range(5)]])
    path = folder / "shard.00000.mds"
    data = bytearray(path.read_bytes())
    offsets = np.frombuffer(data, "<u4", 6, 4).tolist()
    data[12:16] = np.uint32(0xFFFFFFF0).tobytes()  # where the second sample ends and the third begins
    data[offsets[4] : offsets[4] + 4] = np.uint32(7).tobytes()  # size of the last caption
    path.write_bytes(data)
    convert(folder, tmp_path / "out")
    assert list(rejects_of(tmp_path / "out")) == [f"shard.00000.mds:{index}" for index in (1, 2, 4)]


def test_wrong_number_of_samples_in_the_index(tmp_path: Path) -> None:
    folder = write_mds(tmp_path / "mds", [[make_sample(0), make_sample(1)], [make_sample(2)]])
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["samples"] = 3
    (folder / "index.json").write_text(json.dumps(index))
    convert(folder, tmp_path / "out")
    assert len(rejects_of(tmp_path / "out")) == 3
    assert len(read_all(tmp_path / "out")) == 1


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and path.name != "plan.json"}


def test_resumes_bitwise_after_interruptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished parts are kept, and the result is identical to that of an uninterrupted conversion."""
    monkeypatch.setattr(mds, "BYTES_IN_A_PART", 500_000)  # size of two of these files
    folder = write_mds(tmp_path / "mds", [[make_sample(seed)] for seed in range(5)])
    convert(folder, tmp_path / "whole")
    assert len(read_manifest(tmp_path / "whole").splits["train"]) == 3

    real, parts = mds.read_records, []

    def interrupted(part: Any, layout: Any) -> Iterator[Any]:
        for number, record in enumerate(real(part, layout)):
            if number == 1 and part.name not in parts:
                parts.append(part.name)
                raise KeyboardInterrupt
            yield record

    monkeypatch.setattr(mds, "read_records", interrupted)
    for _ in range(2):  # the third part has only one sample
        with pytest.raises(KeyboardInterrupt):
            convert(folder, tmp_path / "out")
        assert not (tmp_path / "out" / "manifest.json").exists()
    convert(folder, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    lines: list[str] = []
    convert(folder, tmp_path / "out", report=lines.append)
    assert "is already complete" in lines[0]
    with pytest.raises(UserError, match=r"started with resolutions"):
        convert(folder, tmp_path / "out", resolutions=[256])


def test_processes_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mds, "BYTES_IN_A_PART", 1)
    folder = write_mds(tmp_path / "mds", [[make_sample(seed)] for seed in range(3)])
    assert convert(folder, tmp_path / "out", process_index=1, process_count=2) is None
    with pytest.raises(UserError, match="from 0 to 1, not 2"):
        convert(folder, tmp_path / "out", process_index=2, process_count=2)
    manifest = convert(folder, tmp_path / "out", process_index=0, process_count=2)
    assert manifest.records("train") == 3
    convert(folder, tmp_path / "single")
    assert contents(tmp_path / "out") == contents(tmp_path / "single")


def test_fingerprint_of_a_local_autoencoder(tmp_path: Path) -> None:
    shipped = Path(mds.__file__).parents[2] / "assets" / "openmoji_vae"
    config = json.loads((shipped / "config.json").read_text())
    with pytest.raises(UserError, match="Set --vae to the image encoder that computed the latents"):
        mds.vae_fingerprint(str(shipped), channels=config["latent_channels"] + 1)
    fingerprint = json.loads((shipped / "metrics.json").read_text())["fingerprint"]
    (tmp_path / "vae").mkdir()
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        shutil.copy(shipped / file, tmp_path / "vae")
    for folder in (tmp_path, tmp_path / "vae"):  # a pipeline, and an autoencoder
        assert mds.vae_fingerprint(str(folder), config["latent_channels"]) == fingerprint
    assert mds.vae_fingerprint("owner/name", 4) == "unverified"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "index.json").unlink(), "No index.json in .* lists any MDS files"),
        (lambda folder: (folder / "index.json").write_text("{}"), "is damaged or not an index of MDS files"),
        (lambda folder: (folder / "index.json").write_text("["), "is damaged or not an index of MDS files"),
        (lambda folder: edit(folder, version=1), "only version 2 is supported"),
        (lambda folder: edit_shard(folder, format="jsonl"), "has format 'jsonl'"),
        (lambda folder: edit_shard(folder, compression="gz"), "has format 'gz'"),
        (
            lambda folder: (folder / "shard.00000.mds.zstd").unlink(),
            "1 MDS files .* are missing, for example shard.00000",
        ),
        (lambda folder: edit_shard(folder, column_names=["jpg", "b", "c", "d"]), "no column caption"),
        (lambda folder: (folder / "shard.00000.mds.zstd").write_bytes(b""), "All MDS files in .* are damaged"),
    ],
)
def test_unsupported_folders_raise_a_user_error(tmp_path: Path, change: Any, message: str) -> None:
    folder = write_mds(tmp_path / "mds", [[make_sample(0)]], "zstd")
    change(folder)
    with pytest.raises(UserError, match=message):
        convert(folder, tmp_path / "out")


def edit(folder: Path, **values: Any) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | values))


def edit_shard(folder: Path, **values: Any) -> None:
    edit(folder, shards=[json.loads((folder / "index.json").read_text())["shards"][0] | values])


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (make_sample(0) | {"caption_latents": bytes(100)}, "caption embeddings of 100 bytes"),
        (make_sample(0) | {"latents_256": bytes(100)}, "not contain float16 latents"),
        (make_sample(0, channels=16) | {"latents_256": pattern(0, (4, 32, 32)).tobytes()}, "not contain float16"),
    ],
)
def test_unsupported_arrays_raise_a_user_error(tmp_path: Path, sample: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        convert(write_mds(tmp_path / "mds", [[sample]]), tmp_path / "out")


def test_columns_of_fixed_size(tmp_path: Path) -> None:
    """The size of a column such as 'width' (int32) is not stored in the sample."""
    folder = write_mds(tmp_path / "mds", [[make_sample(0)]])
    sample = make_sample(0)
    names = ["caption", "caption_latents", "height", "latents_256", "latents_512"]
    sizes = [None, None, 4, None, None]
    columns = [sample.get(name, b"\1\0\0\0") for name in names]
    varying = [len(column) for column, size in zip(columns, sizes, strict=True) if size is None]
    body = np.array(varying, "<u4").tobytes() + b"".join(columns)
    (folder / "shard.00000.mds").write_bytes(np.array([1, 12, 12 + len(body)], "<u4").tobytes() + body)
    edit_shard(
        folder,
        column_names=names,
        column_sizes=sizes,
        raw_data={"basename": "shard.00000.mds", "bytes": 12 + len(body)},
    )
    convert(folder, tmp_path / "out")
    assert_sample(read_all(tmp_path / "out")[0], 0)


def test_layout_is_inferred_from_the_majority(tmp_path: Path) -> None:
    """The first sample of a file may be damaged."""
    samples = [make_sample(seed) for seed in range(3)]
    samples[0]["latents_512"] = b""
    files = list_mds(write_mds(tmp_path / "mds", [samples]))
    assert mds.find_layout(files, None) == Layout((256, 512), 4, 77, 1024)
