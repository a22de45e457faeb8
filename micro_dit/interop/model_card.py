"""The model card (README.md) of a model folder, with the metadata block for the Hugging Face Hub."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

PAPER = "https://arxiv.org/abs/2407.15811"


@dataclasses.dataclass(frozen=True)
class TrainingSummary:
    """A summary of how a model was trained."""

    phases: Sequence[Mapping[str, Any]]  # the config's phases
    step: int
    averaged: bool  # whether the parameters are EMA weights
    data: str  # name of the image source
    started_from: str = ""  # origin of the initial weights; empty if random
    heldout_loss: float | None = None  # held-out loss of these parameters at `heldout_step`; None if not measured
    heldout_step: int = 0

    @property
    def phase(self) -> Mapping[str, Any]:
        """Returns the phase that contains `step`."""
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
    samples: str = "",
    programs: bool = False,
) -> str:
    """Returns the text of a model card.

    Args:
        name: Name of the model.
        parameters: Number of parameters.
        pixels: Side of the images in pixels, or None if not known.
        dtype: Dtype of the weights file.
        license: License identifier of the Hub, such as 'cc-by-sa-4.0'.
        about: Fields of the folder's config.json: encoders, sampling defaults, and the attribution as 'source'.
        vae_included: Whether the folder contains the image encoder.
        recipe: Training summary, for a model from a run.
        samples: File in the folder with a grid of samples; empty for none.
        programs: Whether the folder contains StableHLO programs.
    """
    from huggingface_hub import ModelCardData

    front = ModelCardData(
        language="en", license=license, library_name="micro_dit", pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusion", "diffusion-transformer", "microdit", "jax"],
    )  # fmt: skip
    size = f"{pixels}×{pixels} pixels" if pixels else "images"
    what = (
        f"A text-to-image diffusion transformer ([MicroDiT]({PAPER})) with {parameters:,} parameters, which generates "
        f"{size} from captions. It was trained and exported with micro_dit."
    )
    grid = f"![Samples, each under its prompt]({samples})\n\nThese samples are not cherry-picked."
    where = "in the folder `vae`" if vae_included else "not included"
    encoders = f"""## Encoders

- Latents: `{about["vae"]}` ({where}).
- Captions: `{about["text_encoder"]}`, {about["caption_tokens"]} tokens (not included)."""
    parts = (
        f"---\n{front.to_yaml()}\n---\n\n# {name}", what, grid if samples else "",
        _usage(about["guidance"], about["steps"], programs), encoders, _training(recipe) if recipe else "",
        _data(recipe.data if recipe else "", about["source"], license), _limitations(about["caption_tokens"], dtype),
    )  # fmt: skip
    return "\n\n".join(filter(None, parts)) + "\n"


def _usage(guidance: float, steps: int, programs: bool) -> str:
    text = f"""## Use

```python
from micro_dit import load
model = load("FOLDER")  # this folder
model.generate("a caption", seed=0)[0].save("image.png")
```

By default it samples with Heun's method, {steps} steps and guidance scale {guidance:g}."""
    if programs:
        text += """

`stablehlo/` contains the guided denoiser as a program for CPU, CUDA and TPU. It requires JAX but not micro_dit.
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
    which = "the EMA weights" if recipe.averaged else "the raw parameters, not the EMA weights,"
    text = f"""## Training

| phase | image size | mask ratio | steps | batch size | learning rate |
|---|---|---|---|---|---|
{"".join(rows)}
These are {which} of step {recipe.step:,}, after {images:,} training images including repetitions."""
    if recipe.started_from:
        text += f" Training started from `{recipe.started_from}`."
    if recipe.heldout_loss is not None and math.isfinite(recipe.heldout_loss):
        text += f"\nHeld-out loss at step {recipe.heldout_step:,}: {recipe.heldout_loss:.4f}."
    return text


def _data(data: str, attribution: str, license: str) -> str:
    text = "## Data and license\n\n"
    if data:
        text += f"Trained on `{data}`.\n"
    if attribution:
        text += f"{attribution}. Keep this attribution with the weights and with generated images.\n"
    unknown = license == "unknown"
    return text + (
        "No license has been stated for these weights." if unknown else f"The weights are licensed under `{license}`."
    )


def _limitations(caption_tokens: int, dtype: str) -> str:
    rounded = "" if dtype == "float32" else f"\n- The weights are rounded to {dtype}, which changes samples slightly."
    return f"""## Limitations

- It generates the subjects of its training captions in the style of its training images, and little else.
- Captions are truncated to {caption_tokens} tokens.
- It has the biases of its training data and may reproduce training images, especially from small data sets.
- Faces, hands, text and counts are often wrong. It was not evaluated for safety: do not treat generated images as
  facts, and filter them before publication.{rounded}"""
