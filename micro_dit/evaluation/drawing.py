"""Images by the hundred thousand: a batch is split over all devices of this process, and each draws its own rows.

B images · H W latent rows, columns · C latent channels · L caption tokens · Y caption channels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from micro_dit.diffusion import edm
from micro_dit.diffusion.generate import check_steps, draw_noise, to_uint8
from micro_dit.diffusion.guidance import extrapolate
from micro_dit.diffusion.samplers import heun, noise_levels
from micro_dit.models.config import DiTConfig
from micro_dit.models.dit import Params, bind
from micro_dit.parallel.mesh import BATCH_AXES, batch_sharding, replicated


class Drawing:
    """Draws with Heun's sampler under classifier-free guidance; a scale of guidance is an input, not compiled in."""

    def __init__(
        self,
        config: DiTConfig,
        params: Params,
        image_encoder: Any,
        embed: Callable[[Sequence[str]], np.ndarray],
        *,
        steps: int,
        sigma_data: float,
        mesh: jax.sharding.Mesh,
        dtype: str = "float32",
    ):
        """Copies the parameters to every device.

        Args:
            config, params: of the network.
            image_encoder: an encoders.image.ImageEncoder.
            embed: prompts → caption embeddings (n, L, Y).
            steps: of the sampler.
            sigma_data: as in training.
            mesh: of devices of this process alone.
            dtype: of the matrix products.

        Raises:
            UserError: there are too few steps.
        """
        check_steps(steps)
        self.config, self.image_encoder, self.embed, self.mesh = config, image_encoder, embed, mesh
        self._params = jax.device_put(dict(params), replicated(mesh))
        sigmas = noise_levels(steps)

        def on_each_device(guided: bool) -> Callable[..., jax.Array]:
            def latents(params: Params, captions: jax.Array, noise: jax.Array, scale: jax.Array) -> jax.Array:
                F: edm.Network = bind(config, params, jnp.dtype(dtype))
                F = extrapolate(F, scale) if guided else F
                return heun(lambda x, sigma: edm.denoise(F, x, sigma, captions, sigma_data), noise, sigmas)

            rows, whole = P(BATCH_AXES), P()
            taken = (whole, rows, rows, whole)
            return jax.jit(jax.shard_map(latents, mesh=mesh, in_specs=taken, out_specs=rows, check_vma=False))

        self._plain, self._guided = on_each_device(False), on_each_device(True)

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int], guidance: float) -> np.ndarray:
        """Images (n, H, W, 3) uint8, each of its prompt and seed alone; n must be a multiple of the devices."""
        rows = batch_sharding(self.mesh)
        captions = jax.device_put(np.asarray(self.embed(prompts), np.float32), rows)
        noise = jax.device_put(draw_noise(self.config, seeds), rows)
        program = self._plain if guidance == 1 else self._guided
        return to_uint8(self.image_encoder.decode(program(self._params, captions, noise, np.float32(guidance))))
