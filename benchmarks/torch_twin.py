"""A PyTorch twin of the network, the training step and the sampler: the baseline of the benchmarks.

It uses the same techniques as the public release of MicroDiT: F.scaled_dot_product_attention, expert dispatch by
products with one-hot matrices, bfloat16 autocast on a GPU, fused AdamW and optionally torch.compile. Its parameters
have the release's names and layouts (micro_dit/interop/torch_checkpoint.py). tests/benchmarks/test_torch_twin.py
verifies that it computes the same results as micro_dit.

Shapes: B images · H W latent rows, columns · C latent channels · N tokens · K kept tokens · D backbone width · d block
width · w attention width · h head width · L caption tokens · Y caption channels · E experts · T tokens per expert.
"""

import contextlib
import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from micro_dit.diffusion.samplers import noise_levels
from micro_dit.interop.torch_checkpoint import to_state_dict
from micro_dit.models.config import BlockShape, DiTConfig, swiglu_width, tokens_per_expert
from micro_dit.models.embeddings import position_table
from micro_dit.models.masking import kept_tokens


class Mask(NamedTuple):
    """The kept tokens: their positions (B, K), and the rank of each position (B, N); int64."""

    keep: Tensor
    restore: Tensor


class Drawn(NamedTuple):
    """The inputs of a training step, including random ones: x, noise (B, C, H, W), y (B, L, Y), sigma (B,), float32."""

    x: Tensor
    y: Tensor
    sigma: Tensor
    noise: Tensor
    mask: Mask | None


def norm(width: int, config: DiTConfig) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=config.norm_eps, bias=False)


def gather_tokens(x: Tensor, positions: Tensor) -> Tensor:
    """Gathers tokens at the given positions: (B, N, d), (B, K) → (B, K, d)."""
    return torch.gather(x, 1, positions[:, :, None].expand(-1, -1, x.shape[2]))


class Attention(nn.Module):
    """The common part of self- and cross-attention: QK-norm over all heads without affine parameters, and attention."""

    def __init__(self, dim: int, width: int, config: DiTConfig) -> None:
        super().__init__()
        self.heads, self.eps = width // config.head_dim, config.norm_eps
        self.proj = nn.Linear(width, dim, bias=config.use_bias)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Computes attention of q (B, T, w) to k and v (B, L, w) → (B, T, d)."""
        q, k = (F.layer_norm(a, a.shape[-1:], eps=self.eps).to(v.dtype) for a in (q, k))
        q, k, v = (a.unflatten(-1, (self.heads, -1)).transpose(1, 2) for a in (q, k, v))  # (B, heads, ·, h)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SelfAttention(Attention):
    def __init__(self, dim: int, width: int, config: DiTConfig) -> None:
        super().__init__(dim, width, config)
        self.qkv = nn.Linear(dim, 3 * width, bias=config.use_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(*self.qkv(x).chunk(3, dim=-1))


class CrossAttention(Attention):
    def __init__(self, dim: int, config: DiTConfig) -> None:
        super().__init__(dim, dim, config)
        self.q_linear = nn.Linear(dim, dim, bias=config.use_bias)
        self.kv_linear = nn.Linear(dim, 2 * dim, bias=config.use_bias)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.attend(self.q_linear(x), *self.kv_linear(y).chunk(2, dim=-1))


class SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden: int, config: DiTConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=config.use_bias)
        self.w2 = nn.Linear(dim, hidden, bias=config.use_bias)
        self.w3 = nn.Linear(hidden, dim, bias=config.use_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class ExpertChoice(nn.Module):
    """An expert-choice layer with dispatch by one-hot products: (B, N, d) → (B, N, d)."""

    def __init__(self, dim: int, hidden: int, config: DiTConfig) -> None:
        super().__init__()
        self.experts, self.capacity = config.num_experts, config.expert_capacity
        self.gate = nn.Linear(dim, self.experts, bias=False)
        self.w1 = nn.Parameter(0.02 * torch.randn(self.experts, dim, hidden))
        self.w2 = nn.Parameter(0.02 * torch.randn(self.experts, hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        N = x.shape[1]
        scores = F.softmax(self.gate(x), dim=-1).transpose(1, 2)  # (B, E, N)
        weights, chosen = scores.topk(tokens_per_expert(N, self.experts, self.capacity), dim=-1)  # (B, E, T)
        dispatch = F.one_hot(chosen, N).to(x.dtype)  # (B, E, T, N)
        taken = torch.einsum("betn,bnd->betd", dispatch, x)
        hidden = F.gelu(torch.einsum("betd,edf->betf", taken, self.w1))
        out = torch.einsum("betf,efd->betd", hidden, self.w2)
        return torch.einsum("betn,betd->bnd", dispatch, weights[..., None] * out)


class CaptionBlock(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        D = config.dim
        self.norm1 = norm(D, config)
        self.attn = SelfAttention(D, D, config)
        self.norm2 = norm(D, config)
        self.mlp = SwiGLU(D, swiglu_width(D, 4.0, config.multiple_of), config)

    def forward(self, y: Tensor) -> Tensor:
        y = y + self.attn(self.norm1(y))
        return y + self.mlp(self.norm2(y))


class Modulation(nn.Sequential):
    """The adaLN modulation: (B, D) → `parts` vectors (B, 1, d)."""

    def __init__(self, config: DiTConfig, dim: int, parts: int) -> None:
        super().__init__(nn.GELU(approximate="tanh"), nn.Linear(config.dim, parts * dim))
        self.parts = parts

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        return super().forward(c)[:, None].chunk(self.parts, dim=-1)


class Block(nn.Module):
    """A DiT block: x (B, T, d) tokens, y (B, L, d) caption, c (B, D) conditioning."""

    def __init__(self, shape: BlockShape, config: DiTConfig) -> None:
        super().__init__()
        d = shape.dim
        self.norm1, self.norm2, self.norm3 = (norm(d, config) for _ in range(3))
        self.attn = SelfAttention(d, shape.attention_width, config)
        self.cross_attn = CrossAttention(d, config)
        self.mlp = (ExpertChoice if shape.moe else SwiGLU)(d, shape.hidden_width, config)
        self.adaLN_modulation = Modulation(config, d, 6)

    def forward(self, x: Tensor, y: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c)
        x = x + gate_msa * self.attn(self.norm1(x) * (1 + scale_msa) + shift_msa)
        x = x + self.cross_attn(self.norm2(x), y)
        return x + gate_mlp * self.mlp(self.norm3(x) * (1 + scale_mlp) + shift_mlp)


class FinalLayer(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm_final = norm(config.dim, config)
        self.linear = nn.Linear(config.dim, config.patch_size**2 * config.in_channels)
        self.adaLN_modulation = Modulation(config, config.dim, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class CaptionMLP(nn.Module):
    def __init__(self, features: int, config: DiTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, config.dim)
        self.norm = norm(config.dim, config)
        self.fc2 = nn.Linear(config.dim, config.dim)

    def forward(self, y: Tensor) -> Tensor:
        return self.fc2(self.norm(F.gelu(self.fc1(y), approximate="tanh")))


class PatchEmbedding(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.dim, config.patch_size, stride=config.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, N, D), row-major


class NoiseEmbedding(nn.Module):
    frequencies: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        D = config.dim
        self.mlp = nn.Sequential(nn.Linear(512, D), nn.GELU(approximate="tanh"), nn.Linear(D, D))
        self.register_buffer("frequencies", torch.exp(-math.log(10000) * torch.arange(256) / 256), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = t.float()[:, None] * self.frequencies.float()
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(next(self.mlp.parameters()).dtype))


class CaptionEmbedding(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.y_proj = CaptionMLP(config.caption_channels, config)

    def forward(self, y: Tensor) -> Tensor:
        return self.y_proj(y)


class TorchTwin(nn.Module):
    """The network F(x, t, y): x (B, C, H, W), t (B,), y (B, L, Y) → (B, C, H, W) float32.

    With a mask, the backbone processes only K of the N tokens.
    """

    pos_embed: Tensor
    mask_token: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config, D, M = config, config.dim, config.patch_mixer_dim
        self.x_embedder = PatchEmbedding(config)
        self.t_embedder = NoiseEmbedding(config)
        self.y_embedder = CaptionEmbedding(config)
        self.y_emb_preprocess = CaptionBlock(config)
        self.pooled_y_emb_process = CaptionMLP(D, config)

        def between(width: int, out: int) -> nn.Module:
            if D == M:
                return nn.Identity()
            return nn.Sequential(norm(width, config), nn.Linear(width, out, bias=config.use_bias))

        self.patch_mixer_map_xin, self.patch_mixer_map_y = between(D, M), between(D, M)
        self.patch_mixer = nn.ModuleList(Block(shape, config) for shape in config.mixer_blocks())
        self.patch_mixer_map_xout = between(M, D)
        self.blocks = nn.ModuleList(Block(shape, config) for shape in config.backbone_blocks())
        self.final_layer = FinalLayer(config)
        table = position_table(D, config.grid, config.pos_interp_scale)
        self.register_buffer("pos_embed", torch.from_numpy(table)[None])
        self.register_buffer("mask_token", torch.zeros(1, 1, config.patch_size**2 * config.in_channels))

    def forward(self, x: Tensor, t: Tensor, y: Tensor, mask: Mask | None = None) -> Tensor:
        p, grid = self.config.patch_size, self.config.grid
        x = self.x_embedder(x.to(self.pos_embed.dtype)) + self.pos_embed
        y = self.y_emb_preprocess(self.y_embedder(y.to(self.pos_embed.dtype)))
        c = self.t_embedder(t) + self.pooled_y_emb_process(y.mean(dim=1))
        x, mixer_y = self.patch_mixer_map_xin(x), self.patch_mixer_map_y(y)
        for block in self.patch_mixer:
            x = block(x, mixer_y, c)
        if mask is not None:
            x = gather_tokens(x, mask.keep)
        x = self.patch_mixer_map_xout(x)
        for block in self.blocks:
            x = block(x, y, c)
        x = self.final_layer(x, c).float()
        if mask is not None:
            dropped = self.mask_token.float().expand(x.shape[0], mask.restore.shape[1] - x.shape[1], -1)
            x = gather_tokens(torch.cat([x, dropped], dim=1), mask.restore)
        x = x.unflatten(2, (p, p, -1)).unflatten(1, (grid, grid))  # (B, rows, columns, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], -1, grid * p, grid * p)


def load_params(twin: TorchTwin, params: Mapping[str, Any]) -> None:
    """Loads parameters of `micro_dit.models.dit`, a flat dict of arrays, into the twin."""
    arrays = to_state_dict({name: np.asarray(value) for name, value in params.items()}, twin.config)
    twin.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})


def denoise(network: Any, x: Tensor, sigma: Tensor, y: Tensor, sigma_data: float, mask: Mask | None = None) -> Tensor:
    """Computes EDM's D(x; sigma) (Karras et al. 2022, arXiv 2206.00364, equation 7); sigma (B,)."""
    variance = sigma**2 + sigma_data**2
    c_skip, c_out, c_in = sigma_data**2 / variance, sigma * sigma_data / variance.sqrt(), 1 / variance.sqrt()
    c_skip, c_out, c_in = (c[:, None, None, None] for c in (c_skip, c_out, c_in))
    return c_skip * x + c_out * network(c_in * x, sigma.log() / 4, y, mask)


def edm_loss(twin: TorchTwin, drawn: Drawn, sigma_data: float) -> Tensor:
    """Computes the mean weighted squared error of a batch; with a mask, over the kept patches only."""
    x, y, sigma, noise, mask = drawn
    D_x = denoise(twin, x + sigma[:, None, None, None] * noise, sigma, y, sigma_data, mask)
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    error = weight[:, None, None] * (D_x - x).square().mean(dim=1)  # (B, H, W)
    if mask is None:
        return error.mean()
    per_patch = F.avg_pool2d(error[:, None], twin.config.patch_size).flatten(1)  # (B, N)
    return per_patch.gather(1, mask.keep).mean()


class Training:
    """The training step: random inputs, loss, gradients, clipping and AdamW, without EMA.

    Args:
        twin: The network, on its device.
        learning_rate: Constant learning rate.
        weight_decay, clip, P_mean, P_std, sigma_data, caption_drop, mask_ratio: As in the phase and the recipe.
        microbatch: Images per forward and backward pass; 0 uses the whole batch.
        compiled: Whether to compile the loss with torch.compile.
    """

    def __init__(
        self, twin: TorchTwin, *, learning_rate: float, clip: float, P_mean: float, P_std: float, mask_ratio: float,
        weight_decay: float = 0.1, sigma_data: float = 0.9, caption_drop: float = 0.1, microbatch: int = 0,
        compiled: bool = False,
    ) -> None:  # fmt: skip
        self.twin, self.clip, self.microbatch, self.mask_ratio = twin, clip, microbatch, mask_ratio
        self.P_mean, self.P_std, self.caption_drop = P_mean, P_std, caption_drop
        self.device = twin.pos_embed.device
        self.optimizer = torch.optim.AdamW(
            twin.parameters(), lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, fused=True
        )

        def loss(drawn: Drawn) -> Tensor:
            with autocast(self.device):
                return edm_loss(twin, drawn, sigma_data)

        self.loss = torch.compile(loss, dynamic=False) if compiled else loss

    def draw(self, x: Tensor, y: Tensor) -> Drawn:
        """Samples the random inputs of a step for latents (B, C, H, W) and captions (B, L, Y)."""
        x, B, N = x.float(), x.shape[0], self.twin.config.tokens
        y = y * (torch.rand(B, 1, 1, device=self.device) >= self.caption_drop)
        sigma = (self.P_mean + self.P_std * torch.randn(B, device=self.device)).exp()
        mask = None
        if (kept := kept_tokens(N, self.mask_ratio)) < N:
            order = torch.rand(B, N, device=self.device).argsort(dim=1)
            mask = Mask(order[:, :kept], order.argsort(dim=1))
        return Drawn(x, y.float(), sigma, torch.randn_like(x), mask)

    def gradients(self, drawn: Drawn) -> Tensor:
        """Accumulates the gradients in the parameters, and returns the loss without synchronizing."""
        self.optimizer.zero_grad(set_to_none=True)
        B = drawn.x.shape[0]
        size = self.microbatch or B
        total = torch.zeros((), device=self.device)
        for start in range(0, B, size):
            rows = slice(start, start + size)
            mask = drawn.mask and Mask(*(a[rows] for a in drawn.mask))
            x, y, sigma, noise = (a[rows] for a in drawn[:4])
            loss = self.loss(Drawn(x, y, sigma, noise, mask)) * (size / B)
            loss.backward()
            total += loss.detach()
        return total

    def update(self) -> None:
        """Clips the gradients and applies AdamW."""
        torch.nn.utils.clip_grad_norm_(self.twin.parameters(), self.clip)
        self.optimizer.step()

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Runs one training step, and returns its loss without synchronizing."""
        loss = self.gradients(self.draw(x, y))
        self.update()
        return loss


def autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Returns a context with bfloat16 autocast on a GPU, and no autocast on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


@torch.no_grad()
def heun(
    network: Any, noise: Tensor, y: Tensor, steps: int = 30, guidance: float = 5.0, sigma_data: float = 0.9
) -> Tensor:
    """Samples latents (B, C, H, W) with Heun's method without churn and classifier-free guidance.

    The sampler's state is float64, as in the release.

    Args:
        network: The twin, or torch.compile of it.
        noise: (B, C, H, W) float32, unit normal.
        y: (B, L, Y), caption embeddings.
        steps: Number of sampler steps; the network is called 2·steps - 1 times, with twice the images.
        guidance: Guidance scale.
        sigma_data: Standard deviation of the latents.
    """
    captions = torch.cat([y, torch.zeros_like(y)])

    def guided(x: Tensor, t: Tensor, y: Tensor, mask: None) -> Tensor:
        with autocast(noise.device):
            conditional, unconditional = network(torch.cat([x, x]), torch.cat([t, t]), captions).chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    def slope(x: Tensor, sigma: float) -> Tensor:
        levels = torch.full(x.shape[:1], sigma, dtype=torch.float32, device=x.device)
        return (x - denoise(guided, x.float(), levels, y, sigma_data)) / sigma

    sigmas = noise_levels(steps).tolist()
    x = noise.double() * sigmas[0]
    for here, there in itertools.pairwise(sigmas):
        d = slope(x, here)
        x_next = x + (there - here) * d
        if there > 0:
            x_next = x + (there - here) * (d + slope(x_next, there)) / 2
        x = x_next
    return x.float()
