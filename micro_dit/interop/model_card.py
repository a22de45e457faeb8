"""The README.md of a model folder, with the front matter that the Hugging Face hub reads."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

PAPER = "https://arxiv.org/abs/2407.15811"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model was trained, as far as it is known.

    Attributes:
        phases: the config's; steps, resolution, mask_ratio, batch_size and learning_rate are told of each.
        step: of the checkpoint.
        averaged: the parameters are the moving average.
        data: the name of the source of images.
        started_from: what the weights were before; empty if random.
        heldout_loss: of these parameters at `heldout_step`; None if it was not measured.
    """

    phases: Sequence[Mapping[str, Any]]
    step: int
    averaged: bool
    data: str
    started_from: str = ""
    heldout_loss: float | None = None
    heldout_step: int = 0

    @property
    def phase(self) -> Mapping[str, Any]:
        """The phase that the step is in."""
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
    recipe: Recipe | None = None,
    picture: str = "",
    programs: bool = False,
) -> str:
    """The text of a model card.

    Args:
        name: of the model.
        parameters: how many.
        pixels: side of the images; None if it is not known.
        dtype: of the weights' file.
        license: an identifier of the hub, as in 'cc-by-sa-4.0'.
        about: what the folder's config.json tells: encoders, defaults and, as 'source', whom to attribute.
        vae_included: the image encoder is in the folder.
        recipe: how it was trained; None for a model that is not from a run.
        picture: a file in the folder with a grid of samples; empty for none.
        programs: there is a folder with StableHLO programs.
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
    parts = [f"---\n{front.to_yaml()}\n---\n\n# {name}", what]
    if picture:
        parts.append(f"![Samples, each under its prompt]({picture})\n\nDrawn by these weights; nothing was picked out.")
    parts.append(_usage(about["guidance"], about["steps"], programs))
    parts.append(_encoders(about["vae"], vae_included, about["text_encoder"], about["caption_tokens"]))
    if recipe:
        parts.append(_training(recipe))
    parts.append(_data(recipe.data if recipe else "", about["source"], license))
    parts.append(_limitations(about["caption_tokens"], dtype))
    return "\n\n".join(parts) + "\n"


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


def _encoders(vae: str, included: bool, text_encoder: str, caption_tokens: int) -> str:
    where = "in the folder `vae`" if included else "not included"
    return f"""## Encoders

- Latents: `{vae}` ({where}).
- Captions: `{text_encoder}`, {caption_tokens} tokens (not included)."""


def _training(recipe: Recipe) -> str:
    rows, start, images = [], 0, 0
    for phase in recipe.phases:
        done = min(max(recipe.step - start, 0), phase["steps"])
        images += done * phase["batch_size"]
        start += phase["steps"]
        side = f"{phase['resolution']}×{phase['resolution']}"
        rows.append(
            f"| {phase['name']} | {side} | {phase['mask_ratio']:.0%} | {done:,} of {phase['steps']:,} "
            f"| {phase['batch_size']:,} | {phase['learning_rate']:g} |"
        )
    which = "the moving average of the parameters" if recipe.averaged else "the parameters themselves, not averaged"
    lines = [
        "## Training",
        "",
        "| phase | images | tokens dropped | steps | batch | learning rate |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        f"This is step {recipe.step:,}, after {images:,} images (one seen again counts again): {which}.",
    ]
    if recipe.started_from:
        lines[-1] += f" It started from `{recipe.started_from}`."
    if recipe.heldout_loss is not None and math.isfinite(recipe.heldout_loss):
        lines.append(f"Loss on held-out images at step {recipe.heldout_step:,}: {recipe.heldout_loss:.4f}.")
    return "\n".join(lines)


def _data(data: str, attribution: str, license: str) -> str:
    lines = ["## Data and license", ""]
    if data:
        lines.append(f"Trained on `{data}`.")
    if attribution:
        lines.append(f"{attribution}. Keep this attribution with the weights and with what they draw.")
    if license == "unknown":
        lines.append("Nobody has stated a license of these weights yet.")
    else:
        lines.append(f"The weights are shared under `{license}`.")
    return "\n".join(lines)


def _limitations(caption_tokens: int, dtype: str) -> str:
    narrow = "" if dtype == "float32" else f"\n- The weights are rounded to {dtype}, which changes pictures a little."
    return f"""## Limitations

- It draws what its training captions describe, in the style of its training images, and not much else.
- Of a longer caption it reads the first {caption_tokens} tokens.
- It has the biases of its data, and may come close to single training images, the more so the fewer there were.
- Faces, hands, writing and counts often come out wrong. It was not examined for safety: don't take its pictures for
  facts, and don't show them unfiltered.{narrow}"""
