"""The train step, and the shapes and shardings of the state that it updates.

This module and its imports require only jax, flax, optax and numpy, but no data, checkpoint or config library.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from micro_dit.diffusion import edm, maskdit
from micro_dit.errors import UserError
from micro_dit.models.config import DiTConfig, make_config
from micro_dit.models.dit import bind
from micro_dit.models.layers import Constrain, unconstrained
from micro_dit.models.masking import TokenMask, random_mask
from micro_dit.parallel import sharding
from micro_dit.rng import stream
from micro_dit.training.optimizer import update_ema
from micro_dit.training.phases import Phase
from micro_dit.training.recipe import Recipe
from micro_dit.training.state import TrainState, abstract_state

if TYPE_CHECKING:
    from micro_dit.encoders.info import ImageEncoderInfo, TextEncoderInfo

Metrics = dict[str, jax.Array]


class Draws(NamedTuple):
    """The inputs of the loss for one batch, after all random choices.

    Attributes:
        x: (B, H, W, C) float32, clean latents, sampled from the encoder's posterior.
        y: (B, L, Y) caption embeddings; zero if the caption is dropped.
        sigma: (B,) float32, noise levels.
        noise: (B, H, W, C) float32, standard normal noise.
        mask: The tokens to keep; None without masking.
        path_drop: (B,) bool, whether an image skips the backbone; None if path drop is disabled.
    """

    x: jax.Array
    y: jax.Array
    sigma: jax.Array
    noise: jax.Array
    mask: TokenMask | None
    path_drop: jax.Array | None = None


def draw_inputs(
    batch: Mapping[str, jax.Array], key: jax.Array, step: jax.Array, network: DiTConfig, phase: Phase, recipe: Recipe
) -> Draws:
    """Samples latents, caption drop, noise level, noise, mask and path drop, each from its own random stream.

    Separate streams make them independent of each other. The step is folded into each key, so that steps differ.
    """
    x = batch["latent_mean"].astype(jnp.float32)  # (B, H, W, C)
    if "latent_std" in batch:  # the posterior is sampled again each time that the image is used
        x = x + batch["latent_std"].astype(jnp.float32) * jax.random.normal(stream(key, "posterior", step), x.shape)
    B = x.shape[0]
    dropped = jax.random.bernoulli(stream(key, "caption_drop", step), recipe.caption_drop, (B, 1, 1))
    y = jnp.where(dropped, 0, batch["caption"])  # (B, L, Y)
    sigma = edm.draw_sigma(stream(key, "sigma", step), B, phase.P_mean, phase.P_std)
    noise = jax.random.normal(stream(key, "noise", step), x.shape)
    mask = random_mask(stream(key, "mask", step), B, network.tokens, phase.mask_ratio)
    path_drop = None
    if recipe.path_drop:
        path_drop = jax.random.bernoulli(stream(key, "path_drop", step), recipe.path_drop, (B,))
    return Draws(x, y, sigma, noise, mask, path_drop)


def accumulate_gradients(
    loss: Callable[[Any, Any], jax.Array], params: Any, batch: Any, parts: int,
    constrain: Constrain = unconstrained, place: Callable[[Any], Any] = lambda gradients: gradients,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """Computes the loss and gradients of a batch by accumulation over microbatches.

    Except for rounding, the result equals that of the whole batch at once.

    Args:
        loss: (params, microbatch) → (), the mean loss of the microbatch.
        params: Parameters to differentiate with respect to.
        batch: A pytree of arrays (B, …).
        parts: Number of microbatches; a divisor of B.
        constrain: Constrains the sharding of an activation, given its dimension letters.
        place: Constrains the sharding of the gradients, so that each device accumulates only its shard.

    Returns:
        The loss, () float32, and the gradients, with the structure of `params`.
    """
    value_and_grad = jax.value_and_grad(loss)
    if parts == 1:
        value, gradients = value_and_grad(params, batch)
        return value, place(gradients)

    def microbatches(a: jax.Array) -> jax.Array:
        """Splits (B, …) → (parts, B / parts, …) with a stride, so that every row stays on its device."""
        return constrain(a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), "mB")

    def add(total: Any, part: Any) -> tuple[Any, None]:
        value, gradients = jax.tree.map(jnp.add, total, value_and_grad(params, part))
        return (value, place(gradients)), None

    zero = jnp.float32(0), place(jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add, zero, jax.tree.map(microbatches, batch))
    return jax.tree.map(lambda value: value / parts, total)


def make_train_step(
    network: DiTConfig, phase: Phase, first_step: int, recipe: Recipe, mesh: jax.sharding.Mesh | None = None
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns the function of one optimizer step, which should be jitted with its state donated.

    Args:
        network: Network of the phase.
        phase: The phase, which determines masking, noise levels, learning rate schedule and EMA.
        first_step: Global step at which the phase starts.
        recipe: Settings that all phases share.
        mesh: Devices over which the batch and the state are split; None for a single device.

    Returns:
        A function (state, batch, key, base) → (state, metrics). `base` holds the frozen parameters of a LoRA run, whose
        state holds only the adapter; None without LoRA.
    """
    schedule, optimizer, trainable = phase.schedule(), recipe.optimizer(phase, mesh), recipe.trainable(network)
    constrain = sharding.constrain_to(mesh) if mesh is not None and mesh.size > 1 else unconstrained
    parts = phase.batch_size // recipe.microbatch if recipe.microbatch else 1

    def as_params(tree: Any) -> Any:
        """Constrains arrays to the shardings of the parameters with the same names."""
        if mesh is None or mesh.size == 1:
            return tree
        return jax.lax.with_sharding_constraint(tree, sharding.param_shardings(mesh, tree))

    def loss(params: Any, base: Any, draws: Draws) -> jax.Array:
        if base is not None:
            params = as_params(trainable.merge(params, base))
        model = bind(network, params, jnp.dtype(recipe.dtype), recipe.remat, constrain)
        image_losses = maskdit.loss if network.decoder_depth and not network.fusion else edm.loss
        return image_losses(
            lambda x, t, y: model(x, t, y, draws.mask, phase.mask_position, draws.path_drop), *draws[:4],
            mask=None if network.fusion else draws.mask, patch_size=network.patch_size, sigma_data=recipe.sigma_data,
        ).mean()  # fmt: skip

    def train_step(
        state: TrainState, batch: Mapping[str, jax.Array], key: jax.Array, base: Any = None
    ) -> tuple[TrainState, Metrics]:
        draws = draw_inputs(batch, key, state.step, network, phase, recipe)
        draws = jax.tree.map(lambda array: constrain(array, "B"), draws)
        value, gradients = accumulate_gradients(
            lambda params, part: loss(params, base, part), state.params, draws, parts, constrain, as_params
        )
        in_phase = state.step - first_step
        learning_rate = schedule(in_phase)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = update_ema(ema, params, phase.ema_decay, active=in_phase >= phase.ema_start)
        metrics = {"loss": value, "gradient_norm": optax.tree.norm(gradients), "learning_rate": learning_rate}
        return TrainState(state.step + 1, params, opt_state, ema), metrics

    return train_step


def abstract_train_state(network: DiTConfig, phase: Phase, recipe: Recipe, mesh: jax.sharding.Mesh) -> TrainState:
    """Returns the shapes, dtypes and shardings of the train state in a phase."""
    state = abstract_state(recipe.trainable(network), recipe.optimizer(phase), phase.ema_decay > 0)
    return sharding.placed_as(state, sharding.state_shardings(mesh, state))


def network_of(
    phase: Phase, model: Mapping[str, Any], vae: "ImageEncoderInfo", text_encoder: "TextEncoderInfo"
) -> DiTConfig:
    """Returns the validated network configuration of a phase.

    Args:
        phase: The phase, which determines the resolution and the position scale.
        model: The name of the model size as 'size', and fields that override those of the size. None overrides nothing.
        vae: Image encoder of the latents.
        text_encoder: Text encoder of the captions.

    Raises:
        UserError: The configuration is invalid, or does not support the masking of the phase.
    """
    if phase.resolution % vae.downsample:
        raise UserError(
            f"Phase {phase.name!r} has resolution {phase.resolution}, which is not a multiple of {vae.downsample}, the "
            f"downsampling factor of {vae.name}."
        )
    overrides = {name: value for name, value in model.items() if value is not None and name != "size"}
    network = make_config(
        model["size"], input_size=phase.resolution // vae.downsample, in_channels=vae.channels,
        caption_channels=text_encoder.channels, pos_interp_scale=phase.pos_interp_scale, **overrides,
    )  # fmt: skip
    network.check(phase.mask_ratio, phase.mask_position)
    return network
