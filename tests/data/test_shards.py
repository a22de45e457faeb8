import dataclasses
import errno
import os
from pathlib import Path

import numpy as np
import pytest

from micro_dit.data import shards
from micro_dit.data.shards import (
    ImageEncoderInfo,
    Manifest,
    Record,
    ShardWriter,
    SplitReader,
    Tally,
    TextEncoderInfo,
    check_shards,
    pack_record,
    parse_record,
    read_manifest,
    record_fields,
)
from micro_dit.errors import UserError

VAE = ImageEncoderInfo("tiny", "0123", channels=8, downsample=8)
TEXT = TextEncoderInfo("letters", "4567", tokens=4, channels=6)
FIELDS = record_fields((16, 32), "mean_std", VAE, TEXT)


def make_record(number: int) -> Record:
    generator = np.random.default_rng(number)
    arrays = {field.name: generator.standard_normal(field.shape).astype(field.dtype) for field in FIELDS}
    return Record(f"😀-{number}", f"caption {number} – naïve", arrays)


def make_manifest() -> Manifest:
    return Manifest(
        source="numbers",
        attribution="nobody, CC0",
        resolutions=(16, 32),
        posterior="mean_std",
        vae=VAE,
        text_encoder=TEXT,
        fields=FIELDS,
        dropped={"image is smaller than 16 px": Tally(2, ["a", "b"])},
        altered={},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten records in three files, two in one, and an empty split."""
    with ShardWriter(tmp_path / "shards", ("train", "validation", "empty"), FIELDS, examples_per_shard=4) as writer:
        for number in range(12):
            writer.write("train" if number < 10 else "validation", make_record(number))
        writer.publish(make_manifest())
    return tmp_path / "shards"


def assert_same(one: Record, other: Record) -> None:
    assert (one.id, one.caption) == (other.id, other.caption)
    assert one.arrays.keys() == other.arrays.keys()
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(array, other.arrays[name])
        assert array.dtype == other.arrays[name].dtype


def test_fields_are_the_latents_of_each_resolution_then_the_caption():
    assert [(field.name, field.shape) for field in FIELDS] == [
        ("latent_mean_16", (2, 2, 8)),
        ("latent_std_16", (2, 2, 8)),
        ("latent_mean_32", (4, 4, 8)),
        ("latent_std_32", (4, 4, 8)),
        ("caption_embedding", (4, 6)),
    ]
    samples = record_fields((16, 32), "sample", VAE, TEXT)
    assert [field.name for field in samples] == ["latent_sample_16", "latent_sample_32", "caption_embedding"]


def test_a_record_survives_packing():
    record = make_record(3)
    assert_same(parse_record(pack_record(record, FIELDS), FIELDS), record)


def test_only_the_named_fields_are_parsed():
    record = make_record(3)
    parsed = parse_record(pack_record(record, FIELDS), FIELDS, ["latent_std_32"])
    assert list(parsed.arrays) == ["latent_std_32"]
    np.testing.assert_array_equal(parsed.arrays["latent_std_32"], record.arrays["latent_std_32"])


def test_an_array_of_another_shape_is_refused():
    record = make_record(3)
    record.arrays["latent_std_32"] = record.arrays["latent_std_16"]
    with pytest.raises(ValueError, match="latent_std_32"):
        pack_record(record, FIELDS)


@pytest.mark.parametrize("keep", [0, 10, 16, 100, -1])
def test_a_truncated_record_is_refused(keep: int):
    with pytest.raises(UserError, match=r"make the shards again\.$"):
        parse_record(pack_record(make_record(3), FIELDS)[:keep], FIELDS)


def test_a_record_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch):
    data = pack_record(make_record(3), FIELDS)
    monkeypatch.setattr(shards, "FORMAT_VERSION", 2)
    with pytest.raises(UserError, match="has format 1, and this code reads 2"):
        parse_record(data, FIELDS)


def test_what_is_written_is_read(folder: Path):
    manifest = read_manifest(folder)
    check_shards(manifest, folder, checksums=True)
    assert [file.name for file in manifest.splits["train"]] == [
        f"train-0000{index}-of-00003.array_record" for index in range(3)
    ]
    assert [file.records for file in manifest.splits["train"]] == [4, 4, 2]
    assert manifest.records("validation") == 2
    assert manifest.splits["empty"] == ()
    reader = SplitReader(folder, manifest, "train")
    assert len(reader) == 10
    for number in (9, 0, 4):
        assert_same(reader[number], make_record(number))


def test_the_manifest_survives_json(folder: Path):
    manifest = read_manifest(folder)
    assert dataclasses.replace(manifest, splits={}) == make_manifest()
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_the_folder_appears_only_when_published(tmp_path: Path):
    out = tmp_path / "deep" / "shards"
    with ShardWriter(out, ("train",), FIELDS, 4) as writer:
        for number in range(5):
            writer.write("train", make_record(number))
        assert not out.exists()
        # What a killed process would leave does not look finished.
        (leftover,) = out.parent.iterdir()
        with pytest.raises(UserError, match=r"No shards at .*micro_dit\.precompute"):
            read_manifest(leftover)
        writer.publish(make_manifest())
    assert list(out.parent.iterdir()) == [out]


def test_an_error_leaves_nothing(tmp_path: Path):
    def fail() -> None:
        with ShardWriter(tmp_path / "shards", ("train",), FIELDS, 4) as writer:
            writer.write("train", make_record(0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_existing_shards_are_not_overwritten(folder: Path):
    with pytest.raises(UserError, match="holds finished shards already"):
        ShardWriter(folder, ("train",), FIELDS, 4)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="not an empty folder"):
        ShardWriter(folder, ("train",), FIELDS, 4)


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("write() failed: No space left on device")],
)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
):
    class FullDisk:
        def __init__(self, path: str, options: str):
            Path(path).touch()

        def write(self, data: bytes) -> None:
            raise failure

        def close(self) -> None:
            raise failure

    monkeypatch.setattr(shards, "ArrayRecordWriter", FullDisk)
    with (
        pytest.raises(UserError, match=r"The disk is full at .*: free space there"),
        ShardWriter(tmp_path / "shards", ("train",), FIELDS, 4) as writer,
    ):
        writer.write("train", make_record(0))
    assert list(tmp_path.iterdir()) == []


def test_missing_shards_name_the_command(tmp_path: Path):
    with pytest.raises(UserError, match=r"No shards at .*: make them with python -m micro_dit\.precompute"):
        read_manifest(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format_version": 1}', '{"format_version": 1, "x": 2}'])
def test_a_damaged_manifest_is_refused(folder: Path, text: str):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="is damaged"):
        read_manifest(folder)


def test_a_manifest_of_another_version_is_refused(folder: Path):
    (folder / "manifest.json").write_text('{"format_version": 7, "new": "things"}')
    with pytest.raises(UserError, match="has format 7, and this code reads 1"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"resolution": 64}, "holds latents for 16, 32 px, not 64 px"),
        ({"channels": 4}, "latent channels 8, not 4"),
        ({"caption_tokens": 77}, "caption tokens 4, not 77"),
        ({"caption_channels": 1024}, "caption channels 6, not 1024"),
        ({"vae_fingerprint": "ffff"}, "image encoder fingerprint 0123, not ffff"),
        ({"text_fingerprint": "ffff"}, "text encoder fingerprint 4567, not ffff"),
    ],
)
def test_shards_of_another_kind_are_refused(folder: Path, asked: dict, message: str):
    with pytest.raises(UserError, match=message):
        check_shards(read_manifest(folder), folder, **asked)


def test_shards_of_the_asked_kind_are_accepted(folder: Path):
    check_shards(
        read_manifest(folder),
        folder,
        resolution=32,
        channels=8,
        caption_tokens=4,
        caption_channels=6,
        vae_fingerprint="0123",
        text_fingerprint="4567",
    )


def test_a_missing_shard_is_named(folder: Path):
    (folder / "train-00001-of-00003.array_record").unlink()
    with pytest.raises(UserError, match=r"train-00001-of-00003\.array_record is missing"):
        check_shards(read_manifest(folder), folder)


def test_a_shard_of_another_size_is_named(folder: Path):
    path = folder / "train-00001-of-00003.array_record"
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(UserError, match=r"train-00001-of-00003\.array_record has \d+ bytes instead of \d+"):
        check_shards(read_manifest(folder), folder)


def test_a_shard_with_another_count_is_named(folder: Path):
    path = folder / "train-00001-of-00003.array_record"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match=r"train-00001-of-00003\.array_record has 0 records instead of 4"):
        check_shards(read_manifest(folder), folder)


def test_damage_inside_a_shard_is_found_by_its_checksum_and_on_reading(folder: Path):
    path = folder / "train-00001-of-00003.array_record"
    manifest = read_manifest(folder)
    data = bytearray(path.read_bytes())
    position = data.index(make_record(5).arrays["latent_mean_32"].tobytes())
    data[position] ^= 1
    path.write_bytes(data)
    check_shards(manifest, folder)
    with pytest.raises(UserError, match=r"train-00001-of-00003\.array_record has been altered"):
        check_shards(manifest, folder, checksums=True)
    with pytest.raises(UserError, match=r"Record 5 of .*train-00001-of-00003\.array_record cannot be read"):
        SplitReader(folder, manifest, "train")[5]


@pytest.mark.parametrize("split", ["test", "empty"])
def test_a_split_without_examples_is_refused(folder: Path, split: str):
    with pytest.raises(UserError, match=f"no examples in split '{split}': choose one of train, validation"):
        SplitReader(folder, read_manifest(folder), split)
