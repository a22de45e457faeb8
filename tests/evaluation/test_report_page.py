"""report.html: its content, and that a browser shows it without a network."""

import importlib.util
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from micro_dit.evaluation.image_sets import ImageSetSettings, prepare_image_files
from micro_dit.evaluation.measures import Measure, Measures
from micro_dit.evaluation.report_page import write_report
from micro_dit.images import save_png

PROMPTS = ["<b>red</b> heart", "grinning cat & dog", 'a "quoted" face']


def evaluation(folder: Path) -> Path:
    """Writes a report with two guidance scales, losses by noise level, and metrics."""
    measures = Measures(folder, {"model": "run <1>", "step": 1200, "attribution": "nobody", "parameters": 4_800_000})
    generator = np.random.default_rng(0)
    for guidance in (1.5, 3.0):
        settings = ImageSetSettings("0123", "ema", guidance, 14, 0, "float32", "held-out captions", "4567")
        for number, file in enumerate(prepare_image_files(folder / settings.folder, settings, 9)):
            image = Image.fromarray(generator.integers(0, 256, (4, 4, 3)).astype(np.uint8))
            save_png(image.resize((128, 128)), file, {"prompt": PROMPTS[number % 3], "seed": str(number)})
        images = dict(params="ema", guidance=guidance, prompts="held-out captions", folder=settings.folder, count=9)
        pipeline = {"network": "pt_inception, sha256 0123", "reference": {"images": 30_000, "set": "val2014"}}
        measures.add(Measure("fid", 12.66 + guidance, "lower", pipeline, images))
    for params in ("ema", "raw"):
        pipeline = {"loss": "EDM", "held-out images": 64}
        measures.add(Measure("heldout_loss", 0.25, "lower", pipeline, {"params": params}))
        for sigma in (0.07, 0.55, 4.2):
            measures.add(Measure(f"heldout_loss/sigma={sigma}", 0.3, "lower", pipeline, {"params": params}))
    return write_report(folder, measures, 3.0)


def test_report_has_escaped_prompts_metrics_and_images(tmp_path: Path) -> None:
    text = evaluation(tmp_path).read_text(encoding="utf-8")
    assert "run &lt;1&gt;, step 1,200" in text
    assert "&lt;b&gt;red&lt;/b&gt; heart" in text
    assert "<b>red" not in text
    assert "14.16" in text
    assert "15.66" in text
    assert "images: 30000; set: val2014" in text
    assert text.count("<img") == 9 + 2 * 8 + 1 + 1  # samples, comparison of two guidance scales, two charts
    assert set(re.findall(r'(?:src|href)="([a-z]+:)', text)) == {"data:"}
    assert not re.findall(r"<script|<link(?! rel=\"icon\")|url\(|@import", text)


def test_report_with_only_a_loss_has_no_images(tmp_path: Path) -> None:
    measures = Measures(tmp_path, {"model": "run", "step": None})
    measures.add(Measure("heldout_loss", 0.25, "lower", {"loss": "EDM"}, {"params": "ema"}))
    text = write_report(tmp_path, measures, 3.0).read_text()
    assert "0.2500" in text
    assert "<img" not in text


@pytest.fixture
def browser_path() -> str:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None or importlib.util.find_spec("playwright") is None:
        pytest.skip("needs Chromium and the package playwright")
    return path


def test_browser_shows_the_report_without_a_network(tmp_path: Path, browser_path: str) -> None:
    from playwright.sync_api import sync_playwright

    page_file = evaluation(tmp_path)
    requests: list[str] = []
    messages: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for width in (1180, 400):
            page = browser.new_page(viewport={"width": width, "height": 800})
            page.on("request", lambda request: requests.append(request.url))
            page.on("console", lambda message: messages.append(message.text))
            page.goto(page_file.as_uri())
            page.wait_for_load_state("load")
            evaluate: Callable[[str], int] = page.evaluate
            assert evaluate("[...document.images].filter(image => image.naturalWidth > 0).length") == 27
            assert evaluate("document.documentElement.scrollWidth") <= width
            assert page.locator("details").first.evaluate("d => d.open") is False
        page.locator("summary").first.click()
        assert page.locator("dd", has_text="val2014").first.is_visible()
        browser.close()
    assert {url for url in requests if not url.startswith("data:")} == {page_file.as_uri()}
    assert messages == []
