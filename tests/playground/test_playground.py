"""The playground: validation, sequential requests, agreement with the API, and the page in a browser."""

import base64
import io
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
from PIL import Image

from micro_dit.api import GenerationSettings, load
from micro_dit.encoders import image, text
from micro_dit.errors import UserError
from micro_dit.playground import __main__ as playground
from micro_dit.playground.session import MAX_IMAGES, MAX_LETTERS, MAX_STEPS, Request, Session, find_checkpoints
from tests.helpers.tiny import Blocks, Words

NEWEST, RAW, MASKED = "step 84, unmasked, EMA", "step 84, unmasked, raw", "step 48, masked"
SHORT: dict[str, Any] = dict(
    prompt="one", negative_prompt="", seed=3, steps=2, guidance=2.0, sampler="heun", num=1, checkpoint=NEWEST
)


def request(**changes: Any) -> Request:
    values = SHORT | changes
    prompt, checkpoint, beside = (values.pop(name, "") for name in ("prompt", "checkpoint", "beside"))
    return Request(prompt, GenerationSettings(**values), checkpoint, beside)


@pytest.fixture(scope="module")
def stubs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image, "load_image_encoder", lambda name: Blocks())
        patch.setattr(text, "load_text_encoder", lambda name, tokens: Words())
        yield


@pytest.fixture(scope="module")
def session(finished_run: Path, stubs: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    session = Session([finished_run], tmp_path_factory.mktemp("images"))
    yield session
    session.close()


def pixels(source: Image.Image | Path) -> np.ndarray:
    if isinstance(source, Path):
        with Image.open(source) as opened:
            return np.asarray(opened.convert("RGB"))
    return np.asarray(source)


# ---- The session -----------------------------------------------------------------------------------------------------


def test_checkpoints_of_a_run_are_listed_with_ema_and_raw_weights(
    finished_run: Path, session: Session, tmp_path: Path
) -> None:
    assert list(session.choices)[:2] == [NEWEST, RAW]
    assert list(session.choices)[-1] == MASKED
    two = find_checkpoints([finished_run, finished_run])
    assert f"{finished_run.name}, {RAW}" in two
    with pytest.raises(UserError, match="is neither the work directory"):
        find_checkpoints([finished_run, tmp_path])
    shutil.copy(finished_run / "config.json", tmp_path)
    with pytest.raises(UserError, match="has no checkpoints yet"):
        find_checkpoints([tmp_path])


def test_request_yields_intermediate_images_and_ends_with_the_images_of_the_api(
    session: Session, finished_run: Path
) -> None:
    *forming, last = session.draw(request(num=5, beside=RAW))
    assert [frame.done for frame in forming] == sorted(frame.done for frame in forming)
    seen = [frame.samples[NEWEST][0] for frame in forming]
    assert any(sample is not None and sample.path is None for sample in seen)
    assert last.done == 1.0
    for label, params in ((NEWEST, None), (RAW, "raw")):
        settings = {name: SHORT[name] for name in ("seed", "steps", "guidance", "sampler")}
        images = load(finished_run, params=params).generate("one", num=5, **settings)
        for i, (sample, expected) in enumerate(zip(last.samples[label], images, strict=True)):
            assert sample is not None
            assert sample.path is not None
            np.testing.assert_array_equal(pixels(sample.path), pixels(expected))
            assert sample.request == request(seed=3 + i, checkpoint=label)
    both = [pixels(last.samples[label][0].image) for label in (NEWEST, RAW)]
    assert (both[0] != both[1]).any()


def test_png_metadata_is_that_of_the_sample_command(session: Session) -> None:
    *_, last = session.draw(request(checkpoint=RAW, negative_prompt="two"))
    with Image.open(last.samples[RAW][0].path) as opened:
        metadata = dict(opened.text)
    model = session.model(RAW)
    assert metadata == {
        "prompt": "one", "seed": "3", "sampler": "heun, 2 steps", "guidance": "2.0", "negative_prompt": "two",
        "checkpoint": f"step 84 of {model.about.name}, raw parameters", "config": model.about.config_hash,
        "attribution": "nobody",
    }  # fmt: skip


def test_checkpoints_of_a_run_share_encoders_and_programs_and_two_models_stay_in_memory(session: Session) -> None:
    first, second = session.model(NEWEST), session.model(RAW)
    assert first._generator is second._generator
    assert first._encoders is second._encoders
    session.model(MASKED)
    assert list(session._models) == [RAW, MASKED]


def test_requests_are_processed_one_at_a_time(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    model, running, counts = session.model(NEWEST), list[None](), list[int]()
    original = type(model).generate

    def generate(self: Any, *arguments: Any, **settings: Any) -> Any:
        running.append(None)
        counts.append(len(running))
        time.sleep(0.05)
        images = original(self, *arguments, **settings)
        running.pop()
        return images

    monkeypatch.setattr(type(model), "generate", generate)
    threads = [threading.Thread(target=lambda: list(session.draw(request()))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [1, 1, 1]


def test_closing_the_iterator_stops_the_request(session: Session) -> None:
    before = set(session._folder.iterdir())
    frames = session.draw(request(steps=MAX_STEPS))
    next(frames)
    frames.close()
    list(session.draw(request()))  # waits for the stopped request
    assert len(set(session._folder.iterdir()) - before) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(prompt="x" * (MAX_LETTERS + 1)), "The prompt has 1001 characters. Shorten it to at most 1000"),
        (dict(negative_prompt="x" * (MAX_LETTERS + 1)), "The negative prompt has 1001 characters"),
        (dict(num=MAX_IMAGES + 1), "number of images is 9. Use an integer from 1 to 8"),
        (dict(num=0), "number of images is 0"),
        (dict(steps=MAX_STEPS + 1), "number of steps is 101. Use an integer from 1 to 100"),
        (dict(steps=1, sampler="dpmpp_2m"), "dpmpp_2m needs at least 2 steps"),
        (dict(sampler="rm -rf"), "Unknown sampler 'rm -rf'"),
        (dict(seed=-1), "The seed is -1"),
        (dict(seed=2**32), "The seed is 4294967296"),
        (dict(guidance=float("nan")), "The guidance scale is nan"),
        (dict(guidance=1e9), "The guidance scale is 1000000000.0. Use a number from 0 to 20"),
        (dict(checkpoint="/etc/passwd"), "Unknown checkpoint '/etc/passwd'"),
        (dict(beside="../secret"), "Unknown checkpoint '../secret'"),
    ],
)
def test_settings_out_of_bounds_are_rejected(session: Session, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        list(session.draw(request(**change)))


# ---- HTML ------------------------------------------------------------------------------------------------------------


def test_prompts_are_escaped_in_html(session: Session) -> None:
    prompt = '<script>alert("x")</script>'
    *_, last = session.draw(request(prompt=prompt, negative_prompt=prompt))
    for page in (
        playground.frame_html(last),
        playground.notice(prompt),
        playground.sample_html(last.samples[NEWEST][0]),
    ):
        assert "<script" not in page
        assert "&lt;script&gt;alert(&quot;x&quot;)" in page


def test_save_link_contains_the_image_file(session: Session) -> None:
    *_, last = session.draw(request())
    path = last.samples[NEWEST][0].path
    (saved,) = re.findall(r'<a href="data:image/png;base64,([^"]+)" download="([^"]+)"', playground.frame_html(last))
    assert base64.b64decode(saved[0]) == path.read_bytes()
    assert saved[1] == path.name


def test_settings_of_a_request_are_restored() -> None:
    for original in (request(), request(beside=RAW, guidance=2.5)):
        assert playground.read_request(*playground.controls_of(original)) == original
    with pytest.raises(UserError, match="must be numbers"):
        playground.read_request("one", "", None, 2, 2.0, "heun", 1, NEWEST, "none")


# ---- The page --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def connections() -> Iterator[list[Any]]:
    """Addresses outside this machine that this process tries to connect to."""
    tried: list[Any] = []
    original = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in playground.LOCAL:
            tried.append(address)
            raise OSError(f"{address} is not this machine")
        original(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect)
        yield tried


@pytest.fixture(scope="module")
def url(session: Session, connections: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    gradio = pytest.importorskip("gradio", reason="the page needs the extra `playground`")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page, folder = playground.build_page(session), str(tmp_path_factory.mktemp("gradio"))
    yield playground.serve(page, "127.0.0.1", port, folder)
    with gradio.Blocks() as another, pytest.raises(UserError, match=f"Port {port} of 127.0.0.1 is not available"):
        playground.serve(another, "127.0.0.1", port, folder)
    page.close()
    assert connections == []


def controls(**changes: Any) -> list[Any]:
    values = SHORT | {"beside": playground.NOBODY_BESIDE} | changes
    names = ("prompt", "negative_prompt", "seed", "steps", "guidance", "sampler", "num", "checkpoint", "beside")
    return [values[name] for name in names]


def test_button_generates_images_and_crafted_requests_are_rejected(
    url: str, session: Session, finished_run: Path
) -> None:
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(url, verbose=False, analytics_enabled=False)
    output, messages, gallery = client.predict(*controls(prompt="one two three four <b>"), api_name="/draw")
    assert "the prompt has 6 tokens" in messages.lower()
    assert "<b>" not in messages
    assert "output finished" in output
    expected = load(finished_run).generate("one two three four <b>", seed=3, steps=2, guidance=2.0)[0]
    (entry,) = gallery
    np.testing.assert_array_equal(pixels(Path(entry["image"])), pixels(expected))
    assert entry["caption"] == "one two three four <b> · 3"
    _, _, gallery = client.predict(*controls(seed=4), api_name="/draw")
    assert [entry["caption"] for entry in gallery] == ["one · 4", "one two three four <b> · 3"]

    before = set(session._folder.iterdir())
    _, messages, _ = client.predict(*controls(prompt="x" * 2000), api_name="/draw")
    assert "notice error" in messages
    assert "2000 characters" in messages
    for crafted in (dict(num=100), dict(steps=10**6), dict(checkpoint="/etc/passwd"), dict(sampler="x")):
        with pytest.raises(AppError):
            client.predict(*controls(**crafted), api_name="/draw")
    assert set(session._folder.iterdir()) == before
    with urlopen(url + "config") as config:
        assert b"googleapis" not in config.read()


def test_prompt_typed_in_a_browser_generates_an_image(url: str) -> None:
    api = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no Chromium on this machine")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.on("dialog", lambda dialog: pytest.fail("a prompt ran as a script"))
        page.goto(url)
        prompt = page.get_by_label("Prompt", exact=True)
        prompt.fill("<img src=http://example.com onerror=alert(1)>")
        page.locator("#steps input[type=number]").fill("2")
        page.locator("#steps input[type=number]").press("Tab")
        page.click("#draw")
        image = page.locator(".finished .images img")
        image.wait_for()
        encoded = image.get_attribute("src").removeprefix("data:image/png;base64,")
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as opened:
            assert opened.size == (16, 16)
            assert opened.text["prompt"] == "<img src=http://example.com onerror=alert(1)>"
        page.locator("#session img").wait_for()
        assert page.locator(".output img, #session img").count() == 2  # the prompt did not add an image

        prompt.fill("two")
        page.click("#another")
        page.locator("#session img").nth(1).wait_for()
        page.locator("#session img").nth(1).click()  # the first image, because the newest one comes first
        api.expect(prompt).to_have_value("<img src=http://example.com onerror=alert(1)>")
        api.expect(page.get_by_label("Seed", exact=True)).to_have_value("0")
        prompt.fill("one two three four five")
        prompt.press("Enter")
        page.locator(".notice.warning").wait_for()
        assert "without 'four five'" in page.locator(".notice.warning").inner_text()
        browser.close()
    outside = [address for address in requests if not address.startswith((url, "data:", "blob:"))]
    assert outside == []


def test_missing_gradio_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(UserError, match=re.escape('pip install "gradio>=6.31,<7"')):
        playground.import_gradio()
