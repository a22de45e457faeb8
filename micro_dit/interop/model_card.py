"""The README.md of a model folder, with the front matter that the Hugging Face hub reads."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

PAPER = "https://arxiv.org/abs/2407.15811"


@dataclasses.dataclass(frozen=True)
class TrainingSummary:
    """A summary of how a model was trained."""

    phases: Sequence[Mapping[str, Any]]  # of the config
    step: int
    averaged: bool  # whether the parameters are EMA weights
    data: str  # name of the image source
    started_from: str = ""  # origin of the initial weights; empty if random
    heldout_loss: float | None = None  # of these parameters at `heldout_step`; None if not measured
    heldout_step: int = 0

    @property
    def phase(self) -> Mapping[str, Any]:
        """The phase of the step."""
        ends = itertools.accumulate(phase["steps"] for phase in self.phases)
        return next((phase for phase, end in zip(self.phases, ends, strict=True) if self.step <= end), self.phases[-1])


def model_card(
    name: str,
    *,
    parameters: int,
    pixels: int | None,
    dtype: str,
    license: str,
    about: Mapping[str, Any],
    vae_included: bool,
    recipe: TrainingSummary | None = None,
    picture: str = "",
    programs: bool = False,
) -> str:
    """Returns the text of a model card.

    Args:
        name: Name of the model.
        parameters: Number of parameters.
        pixels: Side of the images, if known.
        dtype: dtype of the weights' file.
        license: License identifier of the hub, as in 'cc-by-sa-4.0'.
        about: Encoders, defaults and, as 'source', attribution, as in the folder's config.json.
        vae_included: Whether the image encoder is in the folder.
        recipe: Training summary, for a model from a run.
        picture: File in the folder with a grid of samples; empty for none.
        programs: Whether there are StableHLO programs in the folder.
    """
    from huggingface_hub import ModelCardData

    front = ModelCardData(
        language="en", license=license, library_name="micro_dit", pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusion", "diffusion-transformer", "microdit", "jax"],
    )  # fmt: skip
    size = f"{pixels}×{pixels} pixels" if pixels else "images"
    what = (
        f"A text-to-image diffusion transformer ([MicroDiT]({PAPER})) of {parameters:,} parameters, which draws {size} "
        "from captions. It was trained and exported with micro_dit."
    )
    grid = f"![Samples, each under its prompt]({picture})\n\nDrawn by these weights; nothing was picked out."
    where = "in the folder `vae`" if vae_included else "not included"
    encoders = f"""## Encoders

- Latents: `{about["vae"]}` ({where}).
- Captions: `{about["text_encoder"]}`, {about["caption_tokens"]} tokens (not included)."""
    parts = (
        f"---\n{front.to_yaml()}\n---\n\n# {name}", what, grid if picture else "",
        _usage(about["guidance"], about["steps"], programs), encoders, _training(recipe) if recipe else "",
        _data(recipe.data if recipe else "", about["source"], license), _limitations(about["caption_tokens"], dtype),
    )  # fmt: skip
    return "\n\n".join(filter(None, parts)) + "\n"


def _usage(guidance: float, steps: int, programs: bool) -> str:
    text = f"""## Use

```python
from micro_dit import load
model = load("FOLDER")  # this one
model.generate("a caption", seed=0)[0].save("picture.png")
```

By default it draws with Heun's method in {steps} steps under guidance of scale {guidance:g}."""
    if programs:
        text += """

`stablehlo/` holds the guided denoiser as a program for CPU, CUDA and TPU, which needs JAX but not micro_dit;
`stablehlo/signature.json` lists its inputs and outputs."""
    return text


def _training(recipe: TrainingSummary) -> str:
    rows, start, images = [], 0, 0
    for phase in recipe.phases:
        done = min(max(recipe.step - start, 0), phase["steps"])
        images += done * phase["batch_size"]
        start += phase["steps"]
        rows.append(
            "| {name} | {resolution}×{resolution} | {mask_ratio:.0%} | {done:,} of {steps:,} | {batch_size:,} "
            "| {learning_rate:g} |\n".format(**phase, done=done)
        )
    which = "the moving average of the parameters" if recipe.averaged else "the parameters themselves, not averaged"
    text = f"""## Training

| phase | images | tokens dropped | steps | batch | learning rate |
|---|---|---|---|---|---|
{"".join(rows)}
This is step {recipe.step:,}, after {images:,} images (one seen again counts again): {which}."""
    if recipe.started_from:
        text += f" It started from `{recipe.started_from}`."
    if recipe.heldout_loss is not None and math.isfinite(recipe.heldout_loss):
        text += f"\nLoss on held-out images at step {recipe.heldout_step:,}: {recipe.heldout_loss:.4f}."
    return text


def _data(data: str, attribution: str, license: str) -> str:
    text = "## Data and license\n\n"
    if data:
        text += f"Trained on `{data}`.\n"
    if attribution:
        text += f"{attribution}. Keep this attribution with the weights and with what they draw.\n"
    unknown = license == "unknown"
    return text + (
        "Nobody has stated a license of these weights yet." if unknown else f"The weights are shared under `{license}`."
    )


def _limitations(caption_tokens: int, dtype: str) -> str:
    narrow = "" if dtype == "float32" else f"\n- The weights are rounded to {dtype}, which changes pictures a little."
    return f"""## Limitations

- It draws what its training captions describe, in the style of its training images, and not much else.
- Of a longer caption it reads the first {caption_tokens} tokens.
- It has the biases of its data, and may come close to single training images, the more so the fewer there were.
- Faces, hands, writing and counts often come out wrong. It was not examined for safety: don't take its pictures for
  facts, and don't show them unfiltered.{narrow}"""
