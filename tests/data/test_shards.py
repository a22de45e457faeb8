import dataclasses
import errno
import itertools
import os
from pathlib import Path

import numpy as np
import pytest

from micro_dit.data import shard_writer, shards
from micro_dit.data.shard_checks import ShardExpectations, check_shards
from micro_dit.data.shard_writer import ShardFileWriter, latent_statistics, shard_name, write_manifest
from micro_dit.data.shards import (
    Manifest,
    Record,
    SplitReader,
    Tally,
    pack_record,
    parse_record,
    read_manifest,
    record_fields,
)
from micro_dit.encoders.info import ImageEncoderInfo, TextEncoderInfo
from micro_dit.errors import UserError
from tests.helpers import tiny

VAE = ImageEncoderInfo("tiny", "0123", channels=8, downsample=8)
TEXT = TextEncoderInfo("letters", "4567", tokens=4, channels=6)
FIELDS = record_fields((16, 32), "mean_std", VAE, TEXT)


def make_record(number: int, captions: int = 1) -> Record:
    generator = np.random.default_rng(number)
    arrays = {f.name: generator.standard_normal(f.shape_in(captions)).astype(f.dtype) for f in FIELDS}
    return Record(f"😀-{number}", tuple(f"caption {number}.{k} – naïve" for k in range(captions)), arrays)


def make_manifest() -> Manifest:
    dropped = {"image is smaller than 16 px": Tally(2, ["a", "b"])}
    return tiny.make_manifest((16, 32), VAE, TEXT, dropped=dropped, caption_cleaning="deepfloyd-2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Writes ten records to three files, two to one file, and an empty split; every third record has three captions."""
    records = [make_record(number, 1 if number % 3 else 3) for number in range(12)]
    splits = {"train": records[:10], "validation": records[10:], "empty": []}
    return tiny.write_folder(tmp_path / "shards", make_manifest(), splits, records_per_file=4)


def assert_same(one: Record, other: Record) -> None:
    assert (one.id, one.captions) == (other.id, other.captions)
    assert one.arrays.keys() == other.arrays.keys()
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(array, other.arrays[name])
        assert array.dtype == other.arrays[name].dtype


# ---- Records ---------------------------------------------------------------------------------------------------------


def test_fields_are_latents_of_each_resolution_then_captions() -> None:
    assert [(field.name, field.shape, field.per_caption) for field in FIELDS] == [
        ("latent_mean_16", (2, 2, 8), False),
        ("latent_std_16", (2, 2, 8), False),
        ("latent_mean_32", (4, 4, 8), False),
        ("latent_std_32", (4, 4, 8), False),
        ("caption_embedding", (4, 6), True),
    ]
    samples = record_fields((16, 32), "sample", VAE, TEXT)
    assert [field.name for field in samples] == ["latent_sample_16", "latent_sample_32", "caption_embedding"]


@pytest.mark.parametrize("seed", range(20))
def test_packed_records_are_parsed_exactly(seed: int) -> None:
    """Ids and captions are random Unicode strings, possibly empty; arrays have random bits, possibly not finite."""
    generator = np.random.default_rng(seed)

    def text(most: int) -> str:
        codes = generator.integers(0, 0x10FFFF, generator.integers(0, most))
        return "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)

    captions = tuple(text(50) for _ in range(generator.integers(1, 6)))
    arrays = {}
    for field in FIELDS:
        shape = field.shape_in(len(captions))
        arrays[field.name] = generator.integers(0, 2**16, shape, np.uint16).view(np.float16)
    record = Record(text(20), captions, arrays)
    data = pack_record(record, FIELDS)
    assert_same(parse_record(data, FIELDS), record)
    for end in generator.integers(0, len(data), 20):
        with pytest.raises(UserError, match=r"Rebuild the shards\.$"):
            parse_record(data[:end], FIELDS)
    with pytest.raises(UserError, match="is damaged"):
        parse_record(data + b"x", FIELDS)


def test_only_the_named_fields_are_parsed() -> None:
    record = make_record(3)
    parsed = parse_record(pack_record(record, FIELDS), FIELDS, ["latent_std_32"])
    assert list(parsed.arrays) == ["latent_std_32"]
    np.testing.assert_array_equal(parsed.arrays["latent_std_32"], record.arrays["latent_std_32"])


def test_invalid_records_cannot_be_packed() -> None:
    record = make_record(3)
    with pytest.raises(ValueError, match="has no caption"):
        pack_record(record._replace(captions=()), FIELDS)
    with pytest.raises(ValueError, match=r"caption_embedding of .* has shape \(1, 4, 6\), not \(2, 4, 6\)"):
        pack_record(record._replace(captions=("one", "two")), FIELDS)
    record.arrays["latent_std_32"] = record.arrays["latent_std_16"]
    with pytest.raises(ValueError, match="latent_std_32"):
        pack_record(record, FIELDS)


def test_record_of_another_version_raises_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    data = pack_record(make_record(3), FIELDS)
    monkeypatch.setattr(shards, "FORMAT_VERSION", 3)
    with pytest.raises(UserError, match="has format version 2, but this code reads version 3"):
        parse_record(data, FIELDS)


# ---- Writing ---------------------------------------------------------------------------------------------------------


def test_written_records_are_read_exactly(folder: Path) -> None:
    manifest = read_manifest(folder)
    check_shards(manifest, folder, checksums=True)
    assert [file.name for file in manifest.splits["train"]] == [
        f"train-0000{index}-of-00003.array_record" for index in range(3)
    ]
    assert [file.records for file in manifest.splits["train"]] == [4, 4, 2]
    assert manifest.records("validation") == 2
    assert manifest.splits["empty"] == ()
    assert manifest.records("test") == 0
    reader = SplitReader(folder, manifest, "train")
    assert len(reader) == 10
    for number in (9, 0, 4):
        assert_same(reader[number], make_record(number, 1 if number % 3 else 3))


def test_manifest_round_trips_through_json(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert dataclasses.replace(manifest, splits={}, statistics={}) == make_manifest()
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_statistics_match_sampled_latents(folder: Path) -> None:
    """The statistics must match those of many samples from the stored posteriors, for each channel."""
    manifest = read_manifest(folder)
    records = [
        make_record(number) for number in range(12)
    ]  # captions come last, so their number does not change the latents
    noise = np.random.default_rng(0)
    for resolution in (16, 32):
        mean, std = (
            np.stack([record.arrays[f"latent_{kind}_{resolution}"] for record in records]).astype(np.float64)
            for kind in ("mean", "std")
        )
        samples = mean + std * noise.standard_normal((500, *mean.shape))
        found = manifest.statistics[str(resolution)]
        np.testing.assert_allclose(found["mean"], mean.mean((0, 1, 2)), atol=1e-12)
        np.testing.assert_allclose(found["mean"], samples.mean((0, 1, 2, 3)), atol=0.05)
        np.testing.assert_allclose(found["std"], samples.std((0, 1, 2, 3)), rtol=0.03)
        assert manifest.latent_std(resolution) == pytest.approx(np.sqrt(np.mean(samples**2)), rel=0.02)


def test_statistics_do_not_depend_on_the_number_of_files(tmp_path: Path) -> None:
    records = [make_record(number) for number in range(7)]
    folders = [tiny.write_folder(tmp_path / str(n), make_manifest(), {"train": records}, n) for n in (2, 7)]
    one, other = (read_manifest(folder).statistics for folder in folders)
    for resolution, moment in itertools.product(("16", "32"), ("mean", "std")):
        np.testing.assert_allclose(one[resolution][moment], other[resolution][moment], rtol=1e-12)


def test_file_appears_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / shard_name("train", 1, 12)
    assert path.name == "train-00001-of-00012.array_record"
    with ShardFileWriter(path, FIELDS) as writer:
        for number in range(3):
            writer.write(make_record(number))
            assert not path.exists()
    assert list(tmp_path.iterdir()) == [path]
    assert (writer.info.name, writer.info.records, writer.info.bytes) == (path.name, 3, path.stat().st_size)


def test_partial_file_of_a_killed_process_is_overwritten(tmp_path: Path) -> None:
    infos = []
    for folder in ("one", "other"):
        path = tmp_path / folder / "train.array_record"
        path.parent.mkdir()
        if folder == "other":
            (path.parent / "train.array_record.partial").write_bytes(bytes(10**6))
        with ShardFileWriter(path, FIELDS) as writer:
            writer.write(make_record(0))
        infos.append(writer.info)
    assert infos[0] == infos[1]


def test_file_without_records_is_not_created(tmp_path: Path) -> None:
    with ShardFileWriter(tmp_path / "empty.array_record", FIELDS) as writer:
        pass
    assert (writer.info.records, writer.info.bytes, writer.latent_sums) == (0, 0, {})
    assert list(tmp_path.iterdir()) == []
    write_manifest(tmp_path, dataclasses.replace(make_manifest(), splits={"train": (writer.info,)}))
    assert read_manifest(tmp_path).splits == {"train": ()}
    assert latent_statistics([writer.latent_sums]) == {}


def test_error_removes_the_partial_file(tmp_path: Path) -> None:
    def fail() -> None:
        with ShardFileWriter(tmp_path / "train.array_record", FIELDS) as writer:
            writer.write(make_record(0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("write() failed: No space left on device")],
)
@pytest.mark.parametrize("fails", ["write", "close"])
def test_full_disk_raises_a_user_error_and_removes_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, fails: str
) -> None:
    class FullDisk:
        def __init__(self, path: str, options: str) -> None:
            Path(path).touch()

        def write(self, data: bytes) -> None:
            if fails == "write":
                raise failure

        def close(self) -> None:
            raise failure

    monkeypatch.setattr(shard_writer, "ArrayRecordWriter", FullDisk)
    with (
        pytest.raises(
            UserError, match=rf"The disk is full at {tmp_path}\. Free some space and run the same command again\.$"
        ),
        ShardFileWriter(tmp_path / "train.array_record", FIELDS) as writer,
    ):
        writer.write(make_record(0))
    assert list(tmp_path.iterdir()) == []


def test_write_error_names_the_file(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=rf"Cannot write {tmp_path}/nowhere/train.array_record .* Fix this"),
        ShardFileWriter(tmp_path / "nowhere" / "train.array_record", FIELDS) as writer,
    ):
        writer.write(make_record(0))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"Cannot write {tmp_path}/file/manifest\.json"):
        write_manifest(tmp_path / "file", make_manifest())


# ---- Reading ---------------------------------------------------------------------------------------------------------


def test_error_for_missing_shards_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No shards at .* Create them with python -m micro_dit\.precompute"):
        read_manifest(tmp_path / "nowhere")


def test_object_store_url_raises_a_user_error() -> None:
    with pytest.raises(UserError, match=r"gs://bucket/shards is in an object store.* Mount the bucket"):
        read_manifest("gs://bucket/shards")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format_version": 2}', '{"format_version": 2, "x": 2}'])
def test_damaged_manifest_raises_a_user_error(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="is damaged"):
        read_manifest(folder)


@pytest.mark.parametrize("version", [1, 7])
def test_manifest_of_another_version_raises_a_user_error(folder: Path, version: int) -> None:
    (folder / "manifest.json").write_text(f'{{"format_version": {version}, "new": "things"}}')
    with pytest.raises(UserError, match=f"has format version {version}, but this code reads version 2. Rebuild"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"resolution": 64}, "have latents for 16, 32 px, but 64 px is requested"),
        ({"caption_tokens": 77}, r"4 caption tokens, but .* for 77\. Set --config\.data\.caption_tokens=4"),
        ({"vae": "sdxl"}, r"image encoder tiny, but .* for sdxl\. Set --config\.data\.vae to"),
        ({"text_encoder": "t5"}, r"text encoder letters, but .* for t5\. Set --config\.data\.text_encoder=letters"),
        ({"vae_fingerprint": "ffff"}, "image encoder fingerprint 0123, but the config asks for ffff"),
        ({"resolution": 16, "sigma_data": 0.5}, "deviation 1.4 at 16 px, but sigma_data is 0.5. Set --config"),
        ({"resolution": 16, "sigma_data": 3.0}, "deviation 1.4 at 16 px, but sigma_data is 3"),
    ],
)
def test_unexpected_shards_raise_a_user_error(folder: Path, asked: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_shards(read_manifest(folder), folder, ShardExpectations(**asked))


def test_expected_shards_are_accepted(folder: Path) -> None:
    expected = ShardExpectations(
        resolution=32, sigma_data=0.9, caption_tokens=4, vae="tiny", vae_fingerprint="0123", text_encoder="letters"
    )
    check_shards(read_manifest(folder), folder, expected)


def test_encoder_names_are_compared_without_fingerprints(folder: Path) -> None:
    known = read_manifest(folder)
    unknown = dataclasses.replace(known, vae=dataclasses.replace(VAE, fingerprint="unverified"))
    check_shards(known, folder, ShardExpectations(vae="a/copy", vae_fingerprint="0123"))
    check_shards(unknown, folder, ShardExpectations(vae="tiny", vae_fingerprint="0123"))
    with pytest.raises(UserError, match="image encoder tiny, but the config asks for other"):
        check_shards(unknown, folder, ShardExpectations(vae="other", vae_fingerprint="0123"))
    with pytest.raises(UserError, match="image encoder tiny, but the config asks for other"):
        check_shards(known, folder, ShardExpectations(vae="other"))


def test_missing_shard_is_named(folder: Path) -> None:
    (folder / "train-00001-of-00003.array_record").unlink()
    with pytest.raises(UserError, match=r"train-00001-of-00003\.array_record is missing"):
        check_shards(read_manifest(folder), folder)


def test_shard_of_wrong_size_is_named(folder: Path) -> None:
    path = folder / "train-00001-of-00003.array_record"
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(UserError, match=r"train-00001-of-00003\.array_record has \d+ bytes instead of \d+"):
        check_shards(read_manifest(folder), folder)


def test_shard_with_wrong_record_count_is_named(folder: Path) -> None:
    path = folder / "train-00001-of-00003.array_record"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match=r"train-00001-of-00003\.array_record has 0 records instead of 4"):
        check_shards(read_manifest(folder), folder)


def test_damaged_shard_is_detected_by_checksum_and_on_reading(folder: Path) -> None:
    path = folder / "train-00001-of-00003.array_record"
    manifest = read_manifest(folder)
    data = bytearray(path.read_bytes())
    position = data.index(make_record(5).arrays["latent_mean_32"].tobytes())
    data[position] ^= 1
    path.write_bytes(data)
    check_shards(manifest, folder)
    with pytest.raises(UserError, match=r"train-00001-of-00003\.array_record has changed"):
        check_shards(manifest, folder, checksums=True)
    with pytest.raises(UserError, match=r"Cannot read record 5 of .*train-00001-of-00003\.array_record"):
        SplitReader(folder, manifest, "train")[5]


@pytest.mark.parametrize("split", ["test", "empty"])
def test_split_without_examples_raises_a_user_error(folder: Path, split: str) -> None:
    with pytest.raises(UserError, match=f"no examples in split '{split}'. Splits with examples: train, validation"):
        SplitReader(folder, read_manifest(folder), split)
