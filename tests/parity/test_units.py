"""Compares outputs and gradients of single layers with golden tensors of the public release."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from micro_dit.interop.torch_checkpoint import from_release_layout, release_name
from micro_dit.models.blocks import CaptionBlock, DiTBlock, FinalLayer
from micro_dit.models.config import BlockShape, DiTConfig, expert_width, swiglu_width, tokens_per_expert
from micro_dit.models.embeddings import CaptionMLP, NoiseEmbedding, PatchEmbedding, position_table
from micro_dit.models.layers import CrossAttention, SelfAttention, SwiGLU, unconstrained
from micro_dit.models.masking import drop_tokens, kept_tokens, mask_from_noise, restore_tokens
from micro_dit.models.moe import ExpertChoiceFFN
from tests.helpers.golden import assert_close, caption, nhwc, read, under

TOLERANCE = 1e-4
EPS = 1e-6


def network_config(about: dict[str, Any], dim: int) -> DiTConfig:
    return DiTConfig(
        input_size=8, dim=dim, depth=1, patch_mixer_depth=0, patch_mixer_dim=dim, qkv_multipliers=(1.0,),
        ffn_multipliers=(1.0,), head_dim=about.get("head_dim", 8), patch_size=about.get("patch_size", 2),
        in_channels=about.get("out_channels", 4), multiple_of=about.get("multiple_of", 8),
        norm_eps=about.get("norm_eps", EPS), use_bias=about.get("use_bias", False),
        num_experts=about.get("num_experts", 4), expert_capacity=about.get("expert_capacity", 2.0),
    )  # fmt: skip


def build(unit: str, about: dict[str, Any], args: dict[str, Any]) -> tuple[nnx.Module, str]:
    """Returns the module for a golden unit, and the prefix of its parameters' names in the network."""
    a = about
    if unit.startswith("moe"):
        hidden = expert_width(a["hidden_dim_arg"], 1.0, a["multiple_of"])
        assert hidden == a["hidden_dim"]
        module: nnx.Module = ExpertChoiceFFN(
            a["dim"], hidden, a["num_experts"], a["expert_capacity"], out_std=0.02, **args
        )
        return module, "blocks.0.mlp."
    if unit.startswith("ff"):
        hidden = swiglu_width(a["hidden_dim_arg"], 1.0, a["multiple_of"])
        assert hidden == a["hidden_dim"]
        return SwiGLU(a["dim"], hidden, use_bias=a["use_bias"], out_std=0.02, **args), "blocks.0.mlp."
    if unit.startswith("self_attn"):
        head_dim = a["hidden_dim"] // a["num_heads"]
        module = SelfAttention(
            a["dim"], a["hidden_dim"], head_dim, use_bias=a["qkv_bias"], eps=EPS, out_std=0.02, **args
        )
        return module, "blocks.0.attn."
    if unit.startswith("cross_attn"):
        head_dim = a["hidden_dim"] // a["num_heads"]
        module = CrossAttention(a["dim"], head_dim, use_bias=a["qkv_bias"], eps=EPS, out_std=0.02, **args)
        return module, "blocks.0.cross_attn."
    if unit.startswith("t_embedder"):
        return NoiseEmbedding(a["hidden_size"], **args), "noise_embedding."
    if unit.startswith("caption_proj"):
        return CaptionMLP(a["in_channels"], a["hidden_size"], eps=EPS, **args), "caption_projection."
    if unit.startswith("mlp"):
        return CaptionMLP(a["features"], a["features"], eps=EPS, **args), "pooled_caption."
    if unit.startswith("prompt_block"):
        return CaptionBlock(network_config(a, a["dim"]), **args), "caption_block."
    if unit.startswith("patch_embed"):
        return PatchEmbedding(a["patch_size"], a["in_chans"], a["embed_dim"], **args), "patch_embedding."
    if unit.startswith("dit_block"):
        config = network_config(a, a["pooled_emb_dim"])
        shape = config._block(a["dim"], a["qkv_ratio"], a["mlp_ratio"], moe=a["moe_block"], scale=1)
        assert (shape.attention_width, shape.hidden_width) == (a["qkv_hidden_dim"], a["mlp_hidden_dim"])
        args |= dict(remat="none", constrain=unconstrained)
        return DiTBlock(BlockShape(**dataclasses.asdict(shape)), config, **args), "blocks.0."
    if unit.startswith("final_layer"):
        config = network_config(a, a["hidden_size"])
        return FinalLayer(config.dim, config.patch_size**2 * config.in_channels, config, **args), "final_layer."
    raise AssertionError(f"no module is known for the golden unit {unit}")


def check_mask(unit: str, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    kept = kept_tokens(about["length"], about["mask_ratio"])
    assert kept == about["len_keep"]
    mask = mask_from_noise(arrays["rand"], kept)
    np.testing.assert_array_equal(mask.keep, arrays["ids_keep"])
    np.testing.assert_array_equal(mask.restore, arrays["ids_restore"])
    np.testing.assert_array_equal(mask.dropped, arrays["mask"])
    taken = drop_tokens(arrays["x"], mask)
    np.testing.assert_array_equal(taken, arrays["x_kept"])
    # micro_dit fills dropped positions with zeros; the release adds a mask token that is zero in every network.
    filled = restore_tokens(taken, mask) + mask.dropped[:, :, None] * arrays["mask_token"]
    np.testing.assert_allclose(filled, arrays["x_restored"], atol=1e-7)


def test_unit(unit: str, golden_dir: Path) -> None:
    everything, about = read(golden_dir / "units.npz")
    about = about["units"][unit]
    if unit.startswith("pos_"):
        table = position_table(about["embed_dim"], about["grid"], about["pos_interp_scale"])
        assert_close(table, everything[unit].reshape(table.shape), TOLERANCE, unit)
        return
    arrays = under(everything, f"{unit}/")
    if unit.startswith("mask"):
        check_mask(unit, about, arrays)
        return

    module, place = build(unit, about, dict(dtype=jnp.dtype(jnp.float32), rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(module)
    leaves = nnx.to_flat_state(state)
    ours = {place + ".".join(map(str, path)): (path, leaf) for path, leaf in leaves}
    stem = _common_place(place)
    golden_name = {name: release_name(name)[len(stem) :] for name in ours}
    assert set(golden_name.values()) == set(under(arrays, "params/"))

    def merged(params: dict[str, jax.Array]) -> nnx.Module:
        return nnx.merge(
            graphdef, nnx.from_flat_state((path, leaf.replace(params[name])) for name, (path, leaf) in ours.items())
        )

    params = {name: from_release_layout(name, arrays[f"params/{golden}"]) for name, golden in golden_name.items()}
    into: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "y": caption, "cond": caption, "x": nhwc if unit.startswith("patch_embed") else np.asarray
    }  # fmt: skip
    inputs = {name: into.get(name, np.asarray)(arrays[name]) for name in about["inputs"]}

    @jax.jit
    def run(params: Any, inputs: dict[str, Any], cotangent: Any) -> Any:
        out, pullback = jax.vjp(lambda p, i: merged(p)(*(i[n] for n in about["inputs"])), params, inputs)  # type: ignore[operator]
        return out, *pullback(cotangent)

    # The cotangent has the output's shape; `caption` removes the extra axis of the release's caption units.
    cotangent = caption(arrays["ct"])
    out, grad_params, grad_inputs = run(params, inputs, cotangent)
    assert_close(out, caption(arrays["out"]), TOLERANCE, unit)
    for name, gradient in grad_inputs.items():
        if f"grad_in/{name}" in arrays:
            expected = into.get(name, np.asarray)(arrays[f"grad_in/{name}"])
            assert_close(gradient, expected, TOLERANCE, f"{unit} gradient of {name}")
    for name, golden in golden_name.items():
        for folder in ("grad/", "grads/"):
            if f"{folder}{golden}" in arrays:
                expected = from_release_layout(name, arrays[f"{folder}{golden}"])
                assert_close(grad_params[name], expected, TOLERANCE, f"{unit} gradient of {golden}")
    if unit.startswith("moe"):
        positions, probabilities = merged(params).route(inputs["x"])  # type: ignore[attr-defined]
        assert positions.shape[-1] == tokens_per_expert(about["tokens"], about["num_experts"], about["expert_capacity"])
        assert_close(np.sort(probabilities), np.sort(arrays["topk_g"]), TOLERANCE, f"{unit} probabilities")
        np.testing.assert_array_equal(np.sort(positions), np.sort(arrays["topk_idx"]))


def _common_place(place: str) -> str:
    """Returns the release's prefix for a prefix of this package: 'noise_embedding.' → 't_embedder.'."""
    special = {"noise_embedding.": "t_embedder.", "caption_projection.": "y_embedder."}
    return special.get(place, release_name(place))


def test_units_exist(golden_dir: Path) -> None:
    if not (golden_dir / "units.npz").exists():
        pytest.skip("this folder of golden tensors has no units")
    assert read(golden_dir / "units.npz")[1]["units"]
