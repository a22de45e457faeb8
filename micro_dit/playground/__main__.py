"""Serves a web page for sampling with a trained model: `python -m micro_dit.playground --workdir=runs/mask75`.

See docs/playground.md.
"""

import base64
import functools
import html
import io
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from micro_dit.cli import run_command
from micro_dit.diffusion.samplers import SAMPLERS
from micro_dit.errors import UserError

if TYPE_CHECKING:
    from micro_dit.api import About
    from micro_dit.playground.session import Frame, Request, Sample, Session

STYLE = Path(__file__).parent / "style.css"
NOBODY_BESIDE = "none"
MAX_HISTORY = 60  # images in the gallery of a browser session
MAX_QUEUE = 16  # waiting requests
OUTPUT_WIDTH, GAP = 816, 14  # width of the image area, and space between images, in pixels
LOCAL = ("127.0.0.1", "localhost", "::1")


def main() -> None:
    """Serves the page until it is interrupted."""
    import_gradio()
    from micro_dit.playground.session import Session

    with tempfile.TemporaryDirectory(prefix="micro_dit_playground_") as folder:
        session = Session([FLAGS.workdir, *FLAGS.compare], Path(folder))
        print("loading the model …", flush=True)
        page = build_page(session)
        url = serve(page, FLAGS.host, FLAGS.port, folder)
        print(f"Running on {url}. Press Ctrl-C to stop; images that you did not save are deleted.", flush=True)
        if FLAGS.host not in LOCAL:
            print(
                f"warning: Everyone who can reach this machine can generate images at {url}. Remove --host to allow "
                "only this machine.",
                file=sys.stderr,
            )
        try:
            page.block_thread()
        finally:
            session.close()


def import_gradio() -> Any:
    """Imports Gradio with analytics disabled; raises UserError if it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise UserError('The playground needs Gradio. Run: pip install "gradio>=6.31,<7".') from error
    return gradio


# ---- The page --------------------------------------------------------------------------------------------------------


def build_page(session: "Session") -> Any:
    """Loads the default model and returns the page (a `gradio.Blocks`) for a session."""
    gr = import_gradio()
    model = session.warm_up()
    with gr.Blocks(title="micro_dit playground", analytics_enabled=False) as page:
        gr.HTML(heading(model), apply_default_css=False)
        with gr.Row(equal_height=False):
            with gr.Column(min_width=320, elem_id="controls"):
                controls, buttons = build_controls(gr, model.about, list(session.choices))
            with gr.Column(min_width=320, elem_id="output"):
                messages = gr.HTML(elem_id="messages", apply_default_css=False)
                output = gr.HTML(INVITATION, elem_id="images", apply_default_css=False)
        gr.HTML('<h2 class="session">This session <span>Click on an image to restore its settings.</span></h2>')
        gallery = gr.Gallery(
            label="This session", show_label=False, container=False, columns=10, fit_columns=False, height="auto",
            object_fit="contain", allow_preview=False, interactive=False, buttons=[], elem_id="session",
        )  # fmt: skip
        history = gr.State([])  # finished samples, newest first

        def restore(history: list[Any], event: gr.SelectData) -> tuple[Any, ...]:  # type: ignore[name-defined]
            if not isinstance(event.index, int) or not 0 <= event.index < len(history):
                return (gr.skip(),) * 11
            sample = history[event.index]
            return *controls_of(sample.request), sample_html(sample), ""

        sampling = dict(
            fn=functools.partial(draw, session), inputs=[*controls.values(), history],
            outputs=[output, messages, gallery, history], show_progress="hidden", concurrency_limit=1,
            concurrency_id="device",
        )  # fmt: skip
        random_seed = "() => Math.floor(Math.random() * 2 ** 31)"
        new_seed = buttons["another"].click(None, None, controls["seed"], js=random_seed)
        started = [
            buttons["draw"].click(**sampling, api_name="draw"),
            controls["prompt"].submit(**sampling, api_visibility="private"),
            new_seed.then(**sampling, api_visibility="private"),
        ]
        buttons["stop"].click(lambda: INVITATION, None, output, cancels=started, api_visibility="private", queue=False)
        restored = [*controls.values(), output, messages]
        gallery.select(restore, history, restored, show_progress="hidden", api_visibility="private")
    return page.queue(max_size=MAX_QUEUE, api_open=False)


def build_controls(gr: Any, about: "About", choices: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the controls, in the order of the arguments of `read_request`, and the buttons, both by name."""
    from micro_dit.playground.session import MAX_GUIDANCE, MAX_IMAGES, MAX_LETTERS, MAX_SEED, MAX_STEPS

    long = dict(max_lines=4, max_length=MAX_LETTERS)
    prompt = gr.Textbox(label="Prompt", placeholder="red heart", autofocus=True, elem_id="prompt", **long)
    negative = gr.Textbox(label="Negative prompt", placeholder="what to steer away from", **long)
    with gr.Row():
        draw = gr.Button("Generate", variant="primary", elem_id="draw")
        stop = gr.Button("Stop", min_width=80, elem_id="stop")
    with gr.Row(equal_height=True):
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=120)
        another = gr.Button("Random seed", min_width=120, elem_id="another")
    num = gr.Slider(1, MAX_IMAGES, 1, step=1, label="Number of images", elem_id="num")
    steps = gr.Slider(1, MAX_STEPS, about.steps, step=1, label="Steps", elem_id="steps")
    guidance = gr.Slider(0, MAX_GUIDANCE, about.guidance, step=0.1, label="Guidance scale")
    sampler = gr.Radio(list(SAMPLERS), value="heun", label="Sampler")
    checkpoint = gr.Dropdown(choices, value=choices[0], label="Checkpoint")
    beside = gr.Dropdown([NOBODY_BESIDE, *choices], value=NOBODY_BESIDE, label="Compare with")
    controls = dict(
        prompt=prompt, negative=negative, seed=seed, steps=steps, guidance=guidance, sampler=sampler, num=num,
        checkpoint=checkpoint, beside=beside,
    )  # fmt: skip
    return controls, dict(draw=draw, stop=stop, another=another)


def draw(session: "Session", *given: Any) -> Iterator[tuple[Any, ...]]:
    """Yields output, messages, gallery and history while images are sampled.

    Args:
        session: The session.
        *given: Values of the controls, in the order of the arguments of `read_request`, and the history.
    """
    *values, history = given
    same = import_gradio().skip()
    try:
        request = read_request(*values)
        yield WAITING, "", same, same
        for frame in session.draw(request):
            notices = "".join(map(notice, frame.warnings))
            if frame.done < 1:
                yield frame_html(frame), notices, same, same
            else:
                finished = [sample for samples in frame.samples.values() for sample in samples]
                history = [*reversed(finished), *history][:MAX_HISTORY]
                yield frame_html(frame), notices, thumbnails(history), history
    except UserError as error:
        yield "", notice(str(error), "error"), same, same


def read_request(*values: Any) -> "Request":
    """Returns the request for the values of the controls.

    The values are validated, because requests do not have to come from the page.

    Raises:
        UserError: A value is invalid.
    """
    from micro_dit.api import GenerationSettings
    from micro_dit.playground.session import Request

    prompt, negative, seed, steps, guidance, sampler, num, checkpoint, beside = values
    try:
        settings = GenerationSettings(
            num=int(num), seed=int(seed), steps=int(steps), guidance=float(guidance), sampler=str(sampler),
            negative_prompt=str(negative or ""),
        )  # fmt: skip
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            "Seed, steps, guidance scale and number of images must be numbers. Fill in all four."
        ) from error
    return Request(str(prompt or ""), settings, str(checkpoint), "" if beside == NOBODY_BESIDE else str(beside))


def controls_of(request: "Request") -> tuple[Any, ...]:
    """Returns the values of the controls for a request. This is the inverse of `read_request`."""
    s = request.settings
    names = (request.prompt, s.negative_prompt, s.seed, s.steps, s.guidance, s.sampler, s.num, request.checkpoint)
    return *names, request.beside or NOBODY_BESIDE


def serve(page: Any, host: str, port: int, folder: str) -> str:
    """Starts the server in the background and returns its URL.

    Args:
        page: The `gradio.Blocks`.
        host: Address to listen on.
        port: Port to listen on.
        folder: Folder of the images and of Gradio's temporary files.

    Raises:
        UserError: The port is in use.
    """
    gr = import_gradio()
    os.environ["GRADIO_TEMP_DIR"] = folder
    # Local fonts only, because Gradio's themes load fonts from the network.
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    theme = gr.themes.Base(
        primary_hue="orange", neutral_hue="stone", radius_size="md", font=fonts, font_mono=["ui-monospace", "monospace"]
    ).set(body_background_fill="#fbfaf7", button_large_text_weight="500", button_large_padding="8px 16px")
    try:
        _, url, _ = page.launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, footer_links=[],
            enable_monitoring=False, ssr_mode=False, max_file_size=1, theme=theme, css_paths=STYLE,
            allowed_paths=[folder],
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"Port {port} of {host} is not available. Set --port to another port.") from error
    return url


# ---- HTML: all text from users and models is escaped -----------------------------------------------------------------


def heading(model: Any) -> str:
    """Returns the heading of the page with the name and size of the model."""
    side = model.config.input_size * model.image_encoder.downsample
    return (
        f'<header class="heading"><h1>micro_dit</h1><p>{html.escape(model.about.name)} · {side}×{side} pixels'
        f" · {sum(p.size for p in model.params.values()) / 1e6:,.1f} M parameters</p></header>"
    )


INVITATION = '<div class="output"><p class="invitation">Enter a prompt and press Generate.</p></div>'
WAITING = '<div class="output"><p class="invitation">Waiting for the device …</p></div>'


def notice(text: str, kind: str = "warning") -> str:
    """Returns a message that is shown above the images."""
    return f'<p class="notice {kind}" role="alert">{html.escape(text[:1].upper() + text[1:])}</p>'


def frame_html(frame: "Frame") -> str:
    """Returns the images of a request, with the grids of two checkpoints side by side."""
    count = len(frame.samples)
    grids = "".join(
        grid_html(label if count > 1 else "", samples, OUTPUT_WIDTH // count - GAP)
        for label, samples in frame.samples.items()
    )
    if frame.done < 1:
        bar = f'<div class="progress" role="progressbar"><span style="width:{100 * frame.done:.0f}%"></span></div>'
        return f'<div class="output">{bar}<div class="grids">{grids}</div></div>'
    first = next(iter(frame.samples.values()))[0]
    assert first is not None
    return f'<div class="output finished"><div class="grids">{grids}</div>{about(first.request, count == 1)}</div>'


def sample_html(sample: "Sample") -> str:
    """Returns one image and its settings."""
    return f'<div class="output finished">{grid_html("", [sample], OUTPUT_WIDTH)}{about(sample.request)}</div>'


def grid_html(label: str, samples: Sequence["Sample | None"], width: int) -> str:
    """Returns the images of a checkpoint. Small images are enlarged by an integer factor, so that they stay sharp."""
    columns = next(n for n in range(1, 9) if n * n >= len(samples))
    room = min((width - GAP * (columns - 1)) // columns, 512)
    size = next((sample.image.width for sample in samples if sample), 0)
    sharp = 0 < 2 * size <= room
    side = size * (room // size) if sharp else room
    title = f"<h2>{html.escape(label)}</h2>" if label else ""
    return (
        f'<section class="checkpoint{" sharp" * sharp}">{title}<div class="images" '
        f'style="--columns:{columns};--side:{side}px;--gap:{GAP}px">{"".join(map(figure, samples))}</div></section>'
    )


def figure(sample: "Sample | None") -> str:
    """Returns an image with its seed, and a link to save its file once it is finished."""
    if sample is None:
        return '<figure><div class="blank"></div><figcaption>…</figcaption></figure>'
    if sample.path:
        kind, data = "png", sample.path.read_bytes()
    else:
        buffer = io.BytesIO()
        sample.image.save(buffer, "WEBP", quality=80)
        kind, data = "webp", buffer.getvalue()
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    save = f'<a href="{source}" download="{html.escape(sample.path.name)}">Save</a>' if sample.path else ""
    caption = f"<figcaption><span>seed {sample.request.settings.seed}</span>{save}</figcaption>"
    return f'<figure><img src="{source}" alt="{html.escape(sample.request.prompt)}">{caption}</figure>'


def about(request: "Request", show_checkpoint: bool = True) -> str:
    """Returns a line with prompt and settings."""
    settings = request.settings
    parts = [f"<q>{html.escape(request.prompt)}</q>" if request.prompt else "no prompt"]
    if settings.negative_prompt:
        parts.append(f"negative prompt <q>{html.escape(settings.negative_prompt)}</q>")
    parts.append(f"{html.escape(settings.sampler)}, {settings.steps} steps, guidance scale {settings.guidance:g}")
    if show_checkpoint:
        parts.append(html.escape(request.checkpoint))
    return f'<p class="about">{" · ".join(parts)}</p>'


def thumbnails(history: Sequence["Sample"]) -> list[tuple[str, str]]:
    """Returns files and captions for the gallery. Gradio escapes the captions."""
    return [(str(p.path), f"{p.request.prompt or '–'} · {p.request.settings.seed}") for p in history]


FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", None, "Work directory of a run, or a model folder.", required=True)
    flags.DEFINE_multi_string("compare", [], "Work directory or model folder whose checkpoints can be selected too.")
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen on. 0.0.0.0 lets other machines connect.")
    flags.DEFINE_integer("port", 7860, "Port to listen on.", lower_bound=1, upper_bound=65535)


if __name__ == "__main__":
    run_command(main, define_flags)
