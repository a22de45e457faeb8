import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from micro_dit.data.captions import CLEANING_VERSION, clean_caption
from micro_dit.data.pipeline import load_split
from micro_dit.data.preparation import prepare, progress
from micro_dit.data.preparation.journal import Journal
from micro_dit.data.preparation.prepare import make_shards
from micro_dit.data.preparation.progress import PreparationProgress
from micro_dit.data.preparation.settings import PreparationSettings
from micro_dit.data.preparation.stages import ENDED_WORKER, Label, make_batches
from micro_dit.data.shard_checks import ShardExpectations, check_shards
from micro_dit.data.shards import Manifest, SplitReader, read_manifest
from micro_dit.data.sources import Example, Item, Reject
from micro_dit.errors import UserError
from tests.helpers import stub_encoders
from tests.helpers.pictures import QUADRANTS, encoded, png_of_zeros, quadrants

Run = Callable[..., Manifest | None]


def plain(width: int, height: int, color: str = "red") -> bytes:
    return encoded(Image.new("RGB", (width, height), color))


def example(id: str, *captions: str, image: bytes | None = None) -> Example:
    return Example(id, plain(16, 16) if image is None else image, captions or (id,))


class ListPart(list):
    def __init__(self, name: str, items: list[Item]) -> None:
        super().__init__(items)
        self.name = name


class ListSource:
    """A source in memory: each split is a list of parts, and each part is a list of items."""

    name, attribution = "list", "nobody, CC0"

    def __init__(self, **splits: list[list[Item]]) -> None:
        self.splits, self._parts = tuple(splits), splits

    def parts(self, split: str) -> list[ListPart]:
        return [ListPart(f"part {number}", items) for number, items in enumerate(self._parts[split])]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Returns `make_shards` with stub encoders; `source` is a ListSource, or a value of --source."""

    def run(
        source: ListSource | str, out: Path | None = None, image: object = None, text: object = None, **changed: Any
    ) -> Manifest | None:
        with monkeypatch.context() as patch:
            for name, stub in stub_encoders.install(image, text).items():
                patch.setattr(name, stub)
            if isinstance(source, ListSource):
                patch.setattr(prepare, "open_source", lambda spec, px: source)
            values: dict[str, Any] = {
                "source": source if isinstance(source, str) else "list",
                "resolutions": (16,),
                "vae": "stub",
            }
            values |= {"batch_size": 3, "clean_captions": False}
            fields = {field.name for field in dataclasses.fields(PreparationSettings)}
            settings = PreparationSettings(**values | {name: changed[name] for name in changed if name in fields})
            others = {"report": lambda line: None} | {name: changed[name] for name in changed if name not in fields}
            return make_shards(settings, str(out or tmp_path / "shards"), **others)

    return run


def rejects(folder: Path) -> dict[str, str]:
    """Returns the reasons in rejects.jsonl by id."""
    lines = (folder / "rejects.jsonl").read_text(encoding="utf-8").splitlines()
    return {line["id"]: line["reason"] for line in map(json.loads, lines)}


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the contents of every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_images_and_captions_are_stored_in_order(run: Run, tmp_path: Path) -> None:
    colors = ["red", "lime", "blue", "white", "black"]
    items: list[Item] = [example(color, image=plain(16, 16, color)) for color in colors]
    manifest = run(ListSource(train=[items[:4], items[4:]], validation=[items[:1]], empty=[]))
    assert manifest == read_manifest(tmp_path / "shards")
    check_shards(manifest, tmp_path / "shards", ShardExpectations(16, caption_tokens=5), checksums=True)
    assert manifest.vae.channels == 3
    assert [(file.name, file.records) for file in manifest.splits["train"]] == [
        ("train-00000-of-00002.array_record", 4),
        ("train-00001-of-00002.array_record", 1),
    ]
    assert manifest.splits["empty"] == ()
    assert (manifest.source, manifest.attribution) == ("list", "nobody, CC0")
    assert (manifest.dropped, manifest.altered, manifest.caption_cleaning) == ({}, {}, "none")

    train = load_split(tmp_path / "shards", "train", 16)
    assert (train["text"], train["id"]) == (colors, colors)
    latents = np.array([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 1], [-1, -1, -1]])
    np.testing.assert_allclose(train["latent_mean"][:, 0, 0], latents)
    assert (train["latent_std"] == 0.5).all()
    np.testing.assert_array_equal(train["caption"], stub_encoders.Letters().encode(colors))
    everything = np.concatenate([latents, latents[:1]])  # both splits
    np.testing.assert_allclose(manifest.statistics["16"]["mean"], everything.mean(0))
    np.testing.assert_allclose(manifest.statistics["16"]["std"], np.sqrt(everything.var(0) + 0.25))


def test_every_caption_is_embedded(run: Run, tmp_path: Path) -> None:
    manifest = run(ListSource(train=[[example("a", "x", "yy", " "), example("b", ""), example("c", "z")]]))
    records = SplitReader(tmp_path / "shards", manifest, "train")
    assert [records[row].captions for row in range(3)] == [("x", "yy"), ("",), ("z",)]
    for row in range(3):
        expected = stub_encoders.Letters().encode(list(records[row].captions))
        np.testing.assert_array_equal(records[row].arrays["caption_embedding"], expected)
    assert {reason: tally.ids for reason, tally in manifest.altered.items()} == {
        "caption is empty (used for unconditional training)": ["b"]
    }


def test_captions_are_cleaned_by_default(run: Run, tmp_path: Path) -> None:
    captions = ("A <b>Cat</b> &amp; a dog @user", "@user", "ünï")
    manifest = run(ListSource(train=[[example("a", *captions)]]), clean_captions=True)
    assert manifest.caption_cleaning == CLEANING_VERSION
    held = SplitReader(tmp_path / "shards", manifest, "train")[0].captions
    assert held == (clean_caption(captions[0]), "ünï") == ("a cat a dog", "ünï")
    with pytest.raises(UserError, match="was started with caption_cleaning deepfloyd-2, but this run has none"):
        run(ListSource(train=[[example("a", *captions)]]))


def test_unusable_inputs_are_named_and_counted(run: Run, tmp_path: Path) -> None:
    class Bright(stub_encoders.MeanColor):
        def encode(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            mean, std = super().encode(images)
            return np.where(mean > 0.9, 1e6, mean), std

    dark = plain(16, 16, "black")
    items: list[Item] = [
        example("good", image=dark),
        Reject("torn", "archive is truncated or damaged"),
        example("bright"),
        example("good", "again", image=dark),
        example("text", image=b"hello"),
        example("small", image=plain(99, 15)),
        example("also good", image=dark),
    ]
    manifest = run(ListSource(train=[items], test=[[example("small", image=plain(3, 3))]]), image=Bright())
    lines = [json.loads(line) for line in (tmp_path / "shards" / "rejects.jsonl").read_text().splitlines()]
    assert [tuple(line.values()) for line in lines] == [
        ("torn", "train", "part 0", "archive is truncated or damaged"),
        ("bright", "train", "part 0", "latents or caption embedding are not finite in float16"),
        ("good", "train", "part 0", "id appears twice in the part"),
        ("text", "train", "part 0", "file is not an image of a known format"),
        ("small", "train", "part 0", "image is smaller than 16 px"),
        ("small", "test", "part 0", "image is smaller than 16 px"),
    ]
    assert tuple(lines[0]) == ("id", "split", "part", "reason")
    assert load_split(tmp_path / "shards", "train", 16)["id"] == ["good", "also good"]
    assert {reason: tally.count for reason, tally in manifest.dropped.items()} == Counter(
        line["reason"] for line in lines
    )


def test_altered_inputs_are_counted_and_named(run: Run, tmp_path: Path) -> None:
    items = [
        example("long", "ab", "abcdef", image=plain(32, 32)),
        example("fits", "abcde", image=plain(32, 40)),
        example("small", "a", image=plain(31, 32)),
    ]
    manifest = run(ListSource(train=[items], test=[items]), resolutions=(32, 16, 32))
    assert {reason: (tally.count, tally.ids) for reason, tally in manifest.altered.items()} == {
        "caption was cut to 5 tokens": (2, ["long"] * 2),
        "image was enlarged to 32 px": (2, ["small"] * 2),
    }
    assert manifest.resolutions == (16, 32)
    assert load_split(tmp_path / "shards", "train", 32)["latent_mean"].shape == (3, 4, 4, 3)


def test_posterior_samples_have_its_moments_and_depend_only_on_the_id(run: Run, tmp_path: Path) -> None:
    items = [example(str(number), image=plain(64, 64)) for number in range(20)]

    def samples(name: str, items: list[Example], **changed: Any) -> np.ndarray:
        run(ListSource(train=[items]), tmp_path / name, resolutions=(64,), posterior="sample", **changed)
        return load_split(tmp_path / name, "train", 64)["latent_mean"]

    first = samples("first", items)
    noise = (first - np.array([1, -1, -1])) / 0.5
    assert noise.mean() == pytest.approx(0, abs=0.05)
    assert noise.std() == pytest.approx(1, abs=0.05)
    assert len(np.unique(noise[:, 0, 0, 0])) == len(items)
    np.testing.assert_array_equal(samples("reversed", items[::-1], batch_size=7)[::-1], first)
    assert not np.array_equal(samples("seeded", items, seed=1), first)


def test_validation_fraction_is_held_out_by_id(run: Run, tmp_path: Path) -> None:
    items = [example(str(number)) for number in range(60)]
    run(ListSource(train=[items[:35], items[35:]]), validation=0.25)
    splits = {split: load_split(tmp_path / "shards", split, 16)["id"] for split in ("train", "validation")}
    assert sorted(splits["train"] + splits["validation"], key=int) == [item.id for item in items]
    assert 8 <= len(splits["validation"]) <= 22
    run(ListSource(train=[items[::-1]]), tmp_path / "reversed", validation=0.25)
    assert load_split(tmp_path / "reversed", "validation", 16)["id"] == splits["validation"][::-1]
    with pytest.raises(UserError, match=r"already has the splits train, test\. Remove --validation"):
        run(ListSource(train=[items], test=[]), tmp_path / "other", validation=0.25)


def test_second_run_changes_nothing_and_rejects_other_settings(run: Run, tmp_path: Path) -> None:
    source, out, lines = ListSource(train=[[example("a")], [example("b")]]), tmp_path / "shards", list[str]()
    manifest = run(source)
    before = contents(out)
    assert run(source, batch_size=8, report=lines.append) == manifest
    assert "is already complete" in lines[-1]
    for source_now, changed, message in (
        (source, {"minimum_side": 8}, r"was started with minimum_side 16, but this run has 8\. Use the original"),
        (source, {"resolutions": (16, 32)}, r"was started with resolutions 16, but this run has 16,32\. "),
        (source, {"text": type("Other", (stub_encoders.Letters,), {"fingerprint": "9"})()}, "text_encoder.fingerprint"),
        (ListSource(train=[[example("a")]]), {}, "was started with length of parts.train 2, but this run has 1"),
    ):
        with pytest.raises(UserError, match=message):
            run(source_now, **changed)
    assert contents(out) == before


def test_source_folder_that_has_grown_is_rejected(run: Run, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in "ab":
        (photos / f"{name}.png").write_bytes(plain(16, 16))
        (photos / f"{name}.txt").write_text(name)
        if name == "a":
            run(f"folder:{photos}")
    with pytest.raises(UserError, match=r"was started with examples listed\.train 1, but this run has 2"):
        run(f"folder:{photos}")


def test_folder_with_other_files_is_not_changed(run: Run, tmp_path: Path) -> None:
    source = ListSource(train=[[example("a")]])
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(plain(16, 16))
    with pytest.raises(UserError, match="is not empty"):
        run(source, tmp_path / "photos")
    with pytest.raises(UserError, match="is a file"):
        run(source, tmp_path / "photos" / "cat.jpg")
    (tmp_path / "photos" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"has finished shards but no plan\.json"):
        run(source, tmp_path / "photos")
    with pytest.raises(UserError, match="gs://bucket/shards is not a local folder"):
        Journal("gs://bucket/shards", {}, {})
    assert len(list((tmp_path / "photos").iterdir())) == 2


def test_only_missing_parts_are_processed_again(run: Run, tmp_path: Path) -> None:
    source = ListSource(train=[[example("a"), example("b")], [example("c")], [example("bad", image=b"")]])
    run(source, tmp_path / "whole")
    whole, out = contents(tmp_path / "whole"), tmp_path / "torn"

    class Torn(list):
        name = "part 1"

        def __iter__(self) -> Any:
            raise UserError("the network is down")

    torn = ListSource(train=source._parts["train"])
    parts: list[Any] = [part if part.name != "part 1" else Torn([0]) for part in source.parts("train")]
    torn.parts = lambda split: parts
    with pytest.raises(UserError, match="the network is down"):
        run(torn, out)
    assert not (out / "manifest.json").exists()
    assert not list(out.rglob("*.partial"))
    first = out / "train-00000-of-00003.array_record"
    written = first.stat().st_mtime_ns
    lines: list[str] = []
    run(source, out, report=lines.append)
    assert "resuming: 1 of 3 parts are done" in lines
    assert first.stat().st_mtime_ns == written
    assert contents(out) == whole

    (out / "manifest.json").unlink()
    first.write_bytes(b"")  # damaged on disk, so the part is processed again
    first.with_name(f"{first.name}.partial").write_bytes(b"left by a killed process")
    (out / "parts" / "process-0").mkdir()
    (out / "parts" / "process-0" / "manifest.json.partial").write_bytes(b"left by a killed process")
    run(source, out)
    assert contents(out) == whole


def test_two_hosts_write_the_same_bytes_as_one(run: Run, tmp_path: Path) -> None:
    source = ListSource(train=[[example(f"{part} {n}") for n in range(part)] for part in range(5)], test=[[]])
    run(source, tmp_path / "one")
    lines: list[str] = []
    assert run(source, tmp_path / "two", process_index=1, process_count=2, report=lines.append) is None
    assert "is complete when all 2 are done" in lines[-1]
    parts = ["test-00000.json", "train-00001.json", "train-00003.json"]
    assert sorted(path.name for path in (tmp_path / "two" / "parts").iterdir()) == parts
    assert run(source, tmp_path / "two", process_index=0, process_count=2) is not None
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_source_without_usable_examples_raises_a_user_error(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"The source list has no usable examples: image file is empty \(2\)\."):
        run(ListSource(train=[[example("1", image=b""), example("2", image=b"")]]))
    with pytest.raises(UserError, match="no items found"):
        run(ListSource(train=[]), tmp_path / "empty")
    assert not (tmp_path / "empty" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"resolutions": ()}, "--resolutions and --batch_size must be positive"),
        ({"resolutions": (0,)}, "must be positive"),
        ({"batch_size": 0}, "must be positive"),
        ({"resolutions": (16, 20)}, "Resolution 20 is not a multiple of 8"),
        ({"posterior": "mode"}, r"Unknown posterior 'mode'\. Set --posterior to one of mean_std, sample"),
        ({"validation": 1.0}, "at least 0 and less than 1"),
        ({"process_index": 2, "process_count": 2}, "from 0 to 1, not 2"),
    ],
)
def test_invalid_arguments_raise_a_user_error(run: Run, tmp_path: Path, changed: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(ListSource(train=[[example("a")]]), **changed)
    assert list(tmp_path.iterdir()) == []


def test_out_of_memory_raises_a_user_error(run: Run) -> None:
    import jax

    class Full(stub_encoders.MeanColor):
        def encode(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    with pytest.raises(UserError, match="out of memory with batches of 3 images"):
        run(ListSource(train=[[example("a")]]), image=Full())


def test_example_that_crashes_its_worker_is_dropped() -> None:
    settings = PreparationSettings("list", (16,), "stub", batch_size=2)
    (batch,) = make_batches([(Label("deadly"), None), (Label(None), None)], settings)
    assert (batch.pixels, batch.last) == ({}, True)
    assert [(id, prepared.dropped) for id, prepared in batch.examples] == [("deadly", ENDED_WORKER)]


def test_progress_reports_rate_idle_time_and_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    lines: list[str] = []
    shown = PreparationProgress(4, dollars_per_hour=36.0, report=lines.append)
    shown.begin_part(1000)
    shown.encoded(1001.0, 1003.0)
    shown.encoded(1002.0, 1005.0)  # dispatched before the previous batch was finished
    shown.encoded(1007.0, 1009.0)  # the device was idle for two of eight seconds
    now = 1002.0
    shown.advance(100)
    assert lines == []
    now = 1010.0
    shown.advance(300)
    shown.begin_part(3000)
    assert lines == [
        "part 1 of 4: 400 of 4,000 images, 40.0 images/s, device idle 25% of the time, 90 s left, $0.10 of $1.00"
    ]
    shown.finish_part()
    shown.close()
    assert len(lines) == 1
    shown.advance(100)
    shown.close()
    assert lines[1].startswith("part 2 of 4: 500 of 8,000 images, 50.0 images/s")
    assert "2.5 min left" in lines[1]


def test_summary_counts_written_dropped_and_altered_inputs(run: Run) -> None:
    lines: list[str] = []
    items = [example("good", "ok"), example("bad", image=b""), example("long", "abcdef")]
    run(ListSource(train=[items]), report=lines.append)
    first, dropped, altered = lines[-1].split("\n")
    assert "train 2 of 3 examples, 1 dropped" in first
    assert dropped == "dropped 1: image file is empty: bad"
    assert altered == "altered 1: caption was cut to 5 tokens: long"


# ---- 500 images in many formats --------------------------------------------------------------------------------------

UPRIGHT_OF = {  # EXIF orientation to the transform of an upright image that is stored with it
    1: lambda image: image,
    2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
    4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
    6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
    7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
    8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
}


def oriented(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(UPRIGHT_OF[orientation](quadrants()), "JPEG", quality=95, exif=exif)


def kinds_of_images() -> dict[str, tuple[str, bytes, np.ndarray | str]]:
    """Returns, by kind, the file suffix, the file contents, and the expected quadrant colors or reject reason."""
    base, frames = quadrants(), {"save_all": True, "append_images": [Image.new("RGB", (32, 32))], "duration": 9}
    grays = QUADRANTS[..., 0]
    as_gray = np.repeat(grays[..., None], 3, -1)
    deep = Image.fromarray(grays.astype(np.uint16).repeat(16, 0).repeat(16, 1) * 257)
    alpha = np.array([[0, 255], [255, 255]], np.uint8)
    transparent = quadrants(np.concatenate([QUADRANTS, alpha[..., None]], -1))
    on_white = np.where(alpha[..., None] == 0, 255, QUADRANTS)
    long = np.zeros((20, 10_000, 3), np.uint8)
    long[:10, :5000], long[:10, 5000:], long[10:, :5000], long[10:, 5000:] = QUADRANTS.reshape(4, 3)
    whole = encoded(Image.effect_noise((64, 64), 50), "JPEG")
    good = {
        "jpeg": (".jpg", encoded(base, "JPEG", quality=95), QUADRANTS),
        "png": (".png", encoded(base), QUADRANTS),
        "cmyk": (".jpg", encoded(base.convert("CMYK"), "JPEG", quality=95), QUADRANTS),
        "gray": (".jpg", encoded(quadrants(grays), "JPEG", quality=95), as_gray),
        "sixteen-bit": (".png", encoded(deep), as_gray),
        "palette": (".png", encoded(base.quantize(8)), QUADRANTS),
        "alpha": (".png", encoded(transparent), on_white),
        "animated-gif": (".gif", encoded(base, "GIF", **frames), QUADRANTS),
        "animated-webp": (".webp", encoded(base, "WEBP", lossless=True, **frames), QUADRANTS),
        "long": (".png", encoded(Image.fromarray(long)), QUADRANTS),
        "wrong-ending": (".jpg", encoded(base), QUADRANTS),
    } | {f"exif-{orientation}": (".jpg", oriented(orientation), QUADRANTS) for orientation in UPRIGHT_OF}
    bad = {
        "one-pixel": (".png", plain(1, 1), "image is smaller than 16 px"),
        "truncated": (".jpg", whole[: len(whole) // 2], "image is damaged (OSError)"),
        "truncated-png": (".png", encoded(base)[:-60], "image is damaged (OSError)"),
        "zero-bytes": (".jpg", b"", "image file is empty"),
        "text": (".jpg", b"This is not an image.\n", "file is not an image of a known format"),
        "bomb": (".png", png_of_zeros(16_000), "image has more than 178 megapixels"),
    }
    return good | bad


def write_odd_folder(folder: Path) -> dict[str, np.ndarray | str]:
    """Writes 500 images with captions; returns the expected quadrant colors or reject reason by id."""
    kinds, expected = kinds_of_images(), {}
    for number in range(488):
        kind = list(kinds)[number % len(kinds)]
        ending, data, result = kinds[kind]
        name = f"{number % 3}/{kind}-{number // 3 * 3}"  # the same names occur in three folders
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / f"{name}{ending}").write_bytes(data)
        (folder / f"{name}.txt").write_text(f"a {kind}")
        expected[f"{name}{ending}"] = result
    for number in range(12):
        name = f"captions/{number}"
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.png").write_bytes(kinds["png"][1])
        if number < 8:
            choices: list[tuple[bytes, Any]] = [(b"", QUADRANTS), (b" \n", QUADRANTS)]
            choices += [(b"caf\xe9", "UTF-8"), (b"\xff\xfe", "UTF-8")]
            caption, result = choices[number % 4]
            (folder / f"{name}.txt").write_bytes(caption)
        else:
            result = "caption"  # there is no text file
        expected[f"{name}.png"] = result
    return expected


def test_folder_of_500_unusual_images(run: Run, tmp_path: Path) -> None:
    expected = write_odd_folder(tmp_path / "photos")
    assert len(expected) == 500
    manifest = run(f"folder:{tmp_path / 'photos'}", batch_size=32, workers=2)
    loaded = load_split(tmp_path / "shards", "train", 16)
    dropped = rejects(tmp_path / "shards")
    assert len(loaded["id"]) + len(dropped) == 500
    assert set(loaded["id"]) | set(dropped) == set(expected)
    assert manifest.records("train") == len(loaded["id"])
    assert {reason: tally.count for reason, tally in manifest.dropped.items()} == Counter(dropped.values())
    assert manifest.altered["caption is empty (used for unconditional training)"].count == 4
    for id, reason in dropped.items():
        assert isinstance(expected[id], str), id
        assert expected[id] in reason, id
    for id, latent in zip(loaded["id"], loaded["latent_mean"], strict=True):
        assert not isinstance(expected[id], str), id
        assert np.abs((latent.astype(np.float32) + 1) * 127.5 - expected[id]).max() < 8, id
