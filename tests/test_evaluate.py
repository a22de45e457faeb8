"""The evaluate command on a tiny run with stub encoders."""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absl import flags
from PIL import Image

from micro_dit import evaluate as command
from micro_dit.api import load
from micro_dit.diffusion.generate import Generator, Sampling
from micro_dit.encoders import image, text
from micro_dit.errors import UserError
from micro_dit.evaluation.during_training import GeneratedImageMetrics, ImageMetrics
from micro_dit.evaluation.evaluate_model import EvaluationRequest, ModelEvaluation, Stopped
from micro_dit.evaluation.evaluator import Schedule, Weights
from micro_dit.evaluation.measures import Measure
from tests.helpers.tiny import Blocks, Words

STEPS: dict[str, Any] = dict(steps=2, guidance=(2.0,), say=lambda text: None)


def evaluate(
    workdir: Path, metrics: Sequence[str], *, stops: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = print, **settings: Any,
) -> list[Measure]:  # fmt: skip
    return ModelEvaluation(workdir, EvaluationRequest(metrics, **settings), load, stops, say).run()


@pytest.fixture
def run(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny run with a held-out split in its config. The encoders are replaced with small stubs."""
    monkeypatch.setattr(image, "load_image_encoder", lambda name: Blocks())
    monkeypatch.setattr(text, "load_text_encoder", lambda name, tokens: Words())
    shutil.copytree(finished_run, tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    config = json.loads(file.read_text())
    config["config"]["data"]["heldout"] = "validation"
    config["config"]["sampling"].update(guidance=2.0, steps=2)
    for phase in config["config"]["phases"]:
        phase["resolution"] = 64  # the resolution of the shards; the stub encoder decodes to 16 pixels
    file.write_text(json.dumps(config))
    return tmp_path / "run"


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))])


def only_set(workdir: Path) -> Path:
    (folder,) = (workdir / "evaluation" / "84").glob("images_*")
    return folder


def test_evaluation_writes_images_metrics_and_report(run: Path) -> None:
    messages: list[str] = []
    found = evaluate(
        run, ("heldout_loss", "domain"), num_images=7, **STEPS | {"guidance": (1.0, 2.0), "say": messages.append}
    )
    folder = run / "evaluation" / "84"
    saved = json.loads((folder / "metrics.json").read_text())
    assert saved["about"]["model"] == "run"
    assert saved["about"]["step"] == 84
    values = {(m["name"], m["images"].get("params"), m["images"].get("guidance")): m["value"] for m in saved["metrics"]}
    # Mean loss and losses at 11 noise levels for EMA and raw weights, and three domain metrics for each set of images.
    assert len(values) == len(found) == 2 * 12 + 2 * 3
    assert all(np.isfinite(value) for value in values.values())
    assert values["heldout_loss", "ema", None] != values["heldout_loss", "raw", None]
    assert values["latent_frechet", "ema", 1.0] != values["latent_frechet", "ema", 2.0]
    assert all(m["pipeline"] for m in saved["metrics"])
    assert len(list(folder.glob("images_*"))) == 2
    assert any("is overestimated" in line for line in messages)
    assert "report.html" in messages[-1]
    page = (folder / "report.html").read_text()
    assert page.count("<img") == 7 + 2 * 7 + 3 + 1
    with Image.open(sorted(next(folder.glob("images_*")).glob("*.png"))[6]) as last:
        assert last.info == {"prompt": "number 1", "seed": "6"}  # the five held-out captions repeat


def test_images_do_not_depend_on_the_batch_size_and_a_set_can_be_extended(run: Path) -> None:
    evaluate(run, ("domain",), num_images=6, **STEPS)  # less than the default batch size of 8
    six = pixels(only_set(run))
    assert len({image.tobytes() for image in six}) == 6
    shutil.rmtree(run / "evaluation")
    first = evaluate(run, ("domain",), num_images=6, batch_size=4, **STEPS)
    assert np.abs(pixels(only_set(run)).astype(int) - six).max() <= 1
    messages: list[str] = []
    more = evaluate(run, ("domain",), num_images=8, batch_size=3, **STEPS | {"say": messages.append})
    assert "6 of 8 images already exist" in messages[0]
    assert np.abs(pixels(only_set(run))[:6].astype(int) - six).max() <= 1
    assert [m.images["count"] for m in more] == [8, 8, 8]  # the metrics of six images are replaced
    assert [m.name for m in more] == [m.name for m in first]


def test_interrupted_evaluation_is_resumed(run: Path) -> None:
    stops = iter([False, True])
    with pytest.raises(Stopped, match="6 of 7 images are in"):
        evaluate(run, ("domain",), num_images=7, batch_size=3, stops=lambda: next(stops), **STEPS)
    folder = only_set(run)
    before = {file: file.stat().st_mtime_ns for file in folder.glob("*.png")}
    assert sorted(file.name for file in before) == [f"{number:06}.png" for number in range(6)]
    (folder / ".000006.png.99.tmp").write_bytes(b"half of an image")
    evaluate(run, ("domain",), num_images=7, batch_size=3, **STEPS)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert len(pixels(folder)) == 7


def test_other_weights_have_their_own_image_set(run: Path) -> None:
    evaluate(run, ("domain",), num_images=2, **STEPS)
    evaluate(run, ("domain",), num_images=2, params="raw", **STEPS)
    sets = sorted((run / "evaluation" / "84").glob("images_*"))
    assert [folder.name.split("_")[1] for folder in sets] == ["ema", "raw"]
    assert np.abs(pixels(sets[0]).astype(int) - pixels(sets[1])).max() > 1


def test_geneval_images_are_sampled(run: Path, tmp_path: Path) -> None:
    prompts = [{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
               {"tag": "colors", "include": [], "prompt": "a photo of a red cake"}]  # fmt: skip
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("\n".join(map(json.dumps, prompts)))
    evaluate(run, ("geneval",), geneval_prompts=str(file), **STEPS)
    (folder,) = (run / "evaluation" / "84").glob("geneval_*")
    assert sorted(p.name for p in folder.iterdir()) == ["00000", "00001"]
    assert json.loads((folder / "00001" / "metadata.jsonl").read_text()) == prompts[1]
    samples = sorted((folder / "00001" / "samples").iterdir())
    assert [sample.name for sample in samples] == ["0000.png", "0001.png", "0002.png", "0003.png"]
    assert len({Image.open(sample).tobytes() for sample in samples}) == 4


@pytest.mark.parametrize(
    ("metrics", "settings", "message"),
    [
        (
            ("fidd",),
            {},
            r"Unknown metric 'fidd'\. Choose from heldout_loss, fid, cmmd, clip_score, domain, geneval",
        ),
        (("domain", "domain"), {}, "metrics domain, domain has duplicates"),
        (("domain",), {"step": 5}, "has no checkpoint of step 5"),
        (("domain",), {"num_images": 0}, "--batch_size and --num_images must be at least 1"),
        (
            ("fid",),
            {"inception": "nowhere.pth"},
            r"Weights of the FID network not found at nowhere\.pth\. Download https",
        ),
        (("clip_score",), {}, r"need a CLIP model\. Set --clip"),
        (("clip_score",), {"clip": "/nowhere"}, "The CLIP model '/nowhere' can't be loaded"),
        (("domain",), {"prompts": "nowhere.txt"}, r"prompts file nowhere.txt can't be read"),
        (("domain",), {"prompts": "coco.json"}, r"The captions file coco.json can't be read"),
        (("geneval",), {}, "Set --geneval_prompts"),
        (("domain",), {"shards": "/nowhere"}, "/nowhere"),
    ],
)
def test_invalid_requests_are_rejected_before_sampling(
    run: Path, metrics: tuple[str, ...], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        evaluate(run, metrics, **STEPS | settings)
    assert "\n" not in str(raised.value)
    assert not list((run / "evaluation").rglob("*.png"))


def test_folders_without_a_model_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is neither the work directory"):
        evaluate(tmp_path, ("domain",))
    (tmp_path / "config.json").write_text('{"config": {}, "shards": {}}')
    with pytest.raises(UserError, match="has no checkpoints yet"):
        evaluate(tmp_path, ("domain",))


def test_domain_metric_rejects_prompts_that_are_not_captions(run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("number 0\na lighthouse\n")
    with pytest.raises(UserError, match="needs captions of the shards as prompts, but 'a lighthouse' is not one"):
        evaluate(run, ("domain",), prompts=str(tmp_path / "prompts.txt"), num_images=2, **STEPS)
    assert not list((run / "evaluation").rglob("*.png"))


def test_metrics_file_of_another_model_is_not_overwritten(run: Path) -> None:
    folder = run / "evaluation" / "84"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text('{"about": {"model": "other"}, "metrics": []}')
    with pytest.raises(UserError, match=r"metrics\.json belongs to another model"):
        evaluate(run, ("domain",), **STEPS)
    (folder / "metrics.json").write_text("{")
    with pytest.raises(UserError, match=r"metrics\.json is damaged"):
        evaluate(run, ("domain",), **STEPS)


def test_command_parses_flags_and_prints_metrics(
    run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", values)
    monkeypatch.setattr(command, "FLAGS", values)
    for name in ("DEFINE_string", "DEFINE_list", "DEFINE_integer", "DEFINE_enum", "DEFINE_bool"):
        define = getattr(flags, name)
        monkeypatch.setattr(flags, name, lambda *a, define=define, **k: define(*a, flag_values=values, **k))
    command.define_flags()
    values([sys.argv[0], f"--workdir={run}", "--metrics=domain", "--num_images=2", "--guidance=1.5,3"])
    command.main()
    printed = capsys.readouterr().out
    assert "caption_retrieval_top1" in printed
    assert "guidance=1.5 count=2" in printed
    with pytest.raises(UserError, match=r"--guidance=3,a has a value that is not a number"):
        command.read_scales(["3", "a"])


def test_domain_metric_during_training(run: Path, finished_run: Path) -> None:
    shards = json.loads((run / "config.json").read_text())["config"]["data"]["shards"]
    model = load(run)
    generator = Generator(model.config, sigma_data=0.9)

    def sample(params: Any, captions: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
        return generator.images(params, captions, seeds, Sampling(2, 2.0), Blocks().decode)

    def evaluator(*metrics: str, num_images: int = 6) -> GeneratedImageMetrics:
        return GeneratedImageMetrics(
            ImageMetrics(metrics, num_images), Schedule(1, 1), sample, Blocks(), shards=shards,
            split="validation", resolution=64, warn=warnings.append,
        )  # fmt: skip

    warnings: list[str] = []
    weights = Weights(model.params, None, merge=lambda params: params)
    domain = evaluator("domain")
    found = domain.run(weights, 1).scalars
    assert set(found) == {
        "evaluation/caption_retrieval_top1", "evaluation/caption_retrieval_top5", "evaluation/latent_frechet"
    }  # fmt: skip
    assert domain.run(weights, 1).scalars == found
    assert len(warnings) == 1
    with pytest.raises(UserError, match="Unknown metric 'geneval'"):
        evaluator("geneval")
    with pytest.raises(UserError, match=r"num_images is 0\. Set --config\.evaluation\.num_images to at least 1"):
        evaluator("domain", num_images=0)
