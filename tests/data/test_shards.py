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
    """Ten records in three files, two in one, and an empty split; every third has three captions."""
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


def test_fields_are_the_latents_of_each_resolution_then_the_captions() -> None:
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
def test_any_record_survives_packing(seed: int) -> None:
    """Ids and captions of any Unicode, empty ones too; arrays of any values, not finite ones too."""
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
        with pytest.raises(UserError, match=r"make the shards again\.$"):
            parse_record(data[:end], FIELDS)
    with pytest.raises(UserError, match="is damaged"):
        parse_record(data + b"x", FIELDS)


def test_only_the_named_fields_are_parsed() -> None:
    record = make_record(3)
    parsed = parse_record(pack_record(record, FIELDS), FIELDS, ["latent_std_32"])
    assert list(parsed.arrays) == ["latent_std_32"]
    np.testing.assert_array_equal(parsed.arrays["latent_std_32"], record.arrays["latent_std_32"])


def test_what_is_no_whole_record_is_refused() -> None:
    record = make_record(3)
    with pytest.raises(ValueError, match="has no caption"):
        pack_record(record._replace(captions=()), FIELDS)
    with pytest.raises(ValueError, match=r"caption_embedding of .* has shape \(1, 4, 6\), not \(2, 4, 6\)"):
        pack_record(record._replace(captions=("one", "two")), FIELDS)
    record.arrays["latent_std_32"] = record.arrays["latent_std_16"]
    with pytest.raises(ValueError, match="latent_std_32"):
        pack_record(record, FIELDS)


def test_a_record_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = pack_record(make_record(3), FIELDS)
    monkeypatch.setattr(shards, "FORMAT_VERSION", 3)
    with pytest.raises(UserError, match="has format 2, and this code reads 3"):
        parse_record(data, FIELDS)


# ---- Writing ---------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(folder: Path) -> None:
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


def test_the_manifest_survives_json(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert dataclasses.replace(manifest, splits={}, statistics={}) == make_manifest()
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_statistics_are_those_of_drawn_latents(folder: Path) -> None:
    """Of many draws from the stored posteriors, channel by channel."""
    manifest = read_manifest(folder)
    records = [make_record(number) for number in range(12)]  # captions come last: their number changes no latent
    noise = np.random.default_rng(0)
    for resolution in (16, 32):
        mean, std = (
            np.stack([record.arrays[f"latent_{kind}_{resolution}"] for record in records]).astype(np.float64)
            for kind in ("mean", "std")
        )
        drawn = mean + std * noise.standard_normal((500, *mean.shape))
        found = manifest.statistics[str(resolution)]
        np.testing.assert_allclose(found["mean"], mean.mean((0, 1, 2)), atol=1e-12)
        np.testing.assert_allclose(found["mean"], drawn.mean((0, 1, 2, 3)), atol=0.05)
        np.testing.assert_allclose(found["std"], drawn.std((0, 1, 2, 3)), rtol=0.03)
        assert manifest.latent_std(resolution) == pytest.approx(np.sqrt(np.mean(drawn**2)), rel=0.02)


def test_statistics_do_not_depend_on_the_files(tmp_path: Path) -> None:
    records = [make_record(number) for number in range(7)]
    folders = [tiny.write_folder(tmp_path / str(n), make_manifest(), {"train": records}, n) for n in (2, 7)]
    one, other = (read_manifest(folder).statistics for folder in folders)
    for resolution, moment in itertools.product(("16", "32"), ("mean", "std")):
        np.testing.assert_allclose(one[resolution][moment], other[resolution][moment], rtol=1e-12)


def test_a_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / shard_name("train", 1, 12)
    assert path.name == "train-00001-of-00012.array_record"
    with ShardFileWriter(path, FIELDS) as writer:
        for number in range(3):
            writer.write(make_record(number))
            assert not path.exists()
    assert list(tmp_path.iterdir()) == [path]
    assert (writer.info.name, writer.info.records, writer.info.bytes) == (path.name, 3, path.stat().st_size)


def test_the_same_records_make_the_same_bytes_over_what_a_killed_process_left(tmp_path: Path) -> None:
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


def test_a_file_without_records_is_not_made(tmp_path: Path) -> None:
    with ShardFileWriter(tmp_path / "empty.array_record", FIELDS) as writer:
        pass
    assert (writer.info.records, writer.info.bytes, writer.latent_sums) == (0, 0, {})
    assert list(tmp_path.iterdir()) == []
    write_manifest(tmp_path, dataclasses.replace(make_manifest(), splits={"train": (writer.info,)}))
    assert read_manifest(tmp_path).splits == {"train": ()}
    assert latent_statistics([writer.latent_sums]) == {}


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
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
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
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
        pytest.raises(UserError, match=rf"The disk is full at {tmp_path}: free space there, and run again\.$"),
        ShardFileWriter(tmp_path / "train.array_record", FIELDS) as writer,
    ):
        writer.write(make_record(0))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=rf"Cannot write {tmp_path}/nowhere/train.array_record .*: correct that"),
        ShardFileWriter(tmp_path / "nowhere" / "train.array_record", FIELDS) as writer,
    ):
        writer.write(make_record(0))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"Cannot write {tmp_path}/file/manifest\.json"):
        write_manifest(tmp_path / "file", make_manifest())


# ---- Reading ---------------------------------------------------------------------------------------------------------


def test_missing_shards_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No shards at .*: make them with python -m micro_dit\.precompute"):
        read_manifest(tmp_path / "nowhere")


def test_an_object_store_is_refused() -> None:
    with pytest.raises(UserError, match=r"gs://bucket/shards is in an object store.*: mount the bucket"):
        read_manifest("gs://bucket/shards")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format_version": 2}', '{"format_version": 2, "x": 2}'])
def test_a_damaged_manifest_is_refused(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="is damaged"):
        read_manifest(folder)


@pytest.mark.parametrize("version", [1, 7])
def test_a_manifest_of_another_version_is_refused(folder: Path, version: int) -> None:
    (folder / "manifest.json").write_text(f'{{"format_version": {version}, "new": "things"}}')
    with pytest.raises(UserError, match=f"has format {version}, and this code reads 2: make the shards again"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"resolution": 64}, "holds latents for 16, 32 px, not 64 px"),
        ({"caption_tokens": 77}, "caption tokens 4, not 77"),
        ({"vae": "sdxl"}, "image encoder tiny, not sdxl"),
        ({"text_encoder": "t5"}, "text encoder letters, not t5"),
        ({"vae_fingerprint": "ffff"}, "image encoder fingerprint 0123, not ffff"),
        ({"resolution": 16, "sigma_data": 0.5}, "deviation 1.4 at 16 px, but sigma_data is 0.5: set sigma_data to"),
        ({"resolution": 16, "sigma_data": 3.0}, "deviation 1.4 at 16 px, but sigma_data is 3"),
    ],
)
def test_shards_of_another_kind_are_refused(folder: Path, asked: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_shards(read_manifest(folder), folder, ShardExpectations(**asked))


def test_shards_of_the_asked_kind_are_accepted(folder: Path) -> None:
    expected = ShardExpectations(
        resolution=32, sigma_data=0.9, caption_tokens=4, vae="tiny", vae_fingerprint="0123", text_encoder="letters"
    )
    check_shards(read_manifest(folder), folder, expected)


def test_names_count_where_fingerprints_are_not_known(folder: Path) -> None:
    known = read_manifest(folder)
    unknown = dataclasses.replace(known, vae=dataclasses.replace(VAE, fingerprint="unverified"))
    check_shards(known, folder, ShardExpectations(vae="a/copy", vae_fingerprint="0123"))
    check_shards(unknown, folder, ShardExpectations(vae="tiny", vae_fingerprint="0123"))
    with pytest.raises(UserError, match="image encoder tiny, not other"):
        check_shards(unknown, folder, ShardExpectations(vae="other", vae_fingerprint="0123"))
    with pytest.raises(UserError, match="image encoder tiny, not other"):
        check_shards(known, folder, ShardExpectations(vae="other"))


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "train-00001-of-00003.array_record").unlink()
    with pytest.raises(UserError, match=r"train-00001-of-00003\.array_record is missing"):
        check_shards(read_manifest(folder), folder)


def test_a_shard_of_another_size_is_named(folder: Path) -> None:
    path = folder / "train-00001-of-00003.array_record"
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(UserError, match=r"train-00001-of-00003\.array_record has \d+ bytes instead of \d+"):
        check_shards(read_manifest(folder), folder)


def test_a_shard_with_another_count_is_named(folder: Path) -> None:
    path = folder / "train-00001-of-00003.array_record"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match=r"train-00001-of-00003\.array_record has 0 records instead of 4"):
        check_shards(read_manifest(folder), folder)


def test_damage_inside_a_shard_is_found_by_its_checksum_and_on_reading(folder: Path) -> None:
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
def test_a_split_without_examples_is_refused(folder: Path, split: str) -> None:
    with pytest.raises(UserError, match=f"no examples in split '{split}': choose one of train, validation"):
        SplitReader(folder, read_manifest(folder), split)
