import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from micro_dit.errors import UserError
from micro_dit.models.dit import abstract_params, bind
from micro_dit.parallel import mesh as meshes
from micro_dit.parallel.sharding import param_shardings
from micro_dit.training.lora import LoRA, make_lora
from tests.helpers import tiny

NETWORK = tiny.network()
ATTENTION = r"attn\.(qkv|q|kv|proj)\.kernel$"


def adapter_of(lora: LoRA, seed: int = 0) -> dict[str, jax.Array]:
    """Returns an adapter with random A and B, so that A·B is not zero."""
    generator = np.random.default_rng(seed)
    shapes = lora.abstract(abstract_params(NETWORK))
    return {name: jnp.asarray(generator.standard_normal(leaf.shape, np.float32)) for name, leaf in shapes.items()}


def test_a_new_adapter_does_not_change_the_parameters_and_has_variance_one_over_in() -> None:
    base, lora = tiny.random_params(NETWORK), LoRA(8, 4.0, "mlp.w1")
    adapter = lora.init(base, jax.random.key(0))
    assert {name: leaf.shape for name, leaf in adapter.items()} == {
        name: leaf.shape for name, leaf in lora.abstract(base).items()
    }
    for name, value in lora.merge(base, adapter).items():
        np.testing.assert_array_equal(value, base[name])
    for name, value in adapter.items():
        if name.endswith("lora_a"):
            assert float(jnp.std(value)) * math.sqrt(value.shape[-2]) == pytest.approx(1, abs=0.2), name
        else:
            np.testing.assert_array_equal(value, 0)


def test_merging_adds_alpha_over_rank_times_a_b_to_adapted_kernels() -> None:
    base, lora = tiny.random_params(NETWORK), LoRA(2, 6.0, r"\.mlp\.w[12]$")  # matches only experts
    adapter = adapter_of(lora)
    merged = lora.merge(base, adapter)
    adapted = {name.removesuffix(".lora_a") for name in adapter if name.endswith("a")}
    assert adapted == {name for name in base if name.endswith((".mlp.w1", ".mlp.w2"))}
    assert set(merged) == set(base)
    for name, value in merged.items():
        if name not in adapted:
            assert value is base[name]
            continue
        assert value.dtype == np.float32
        for expert in range(NETWORK.num_experts):
            a, b = (np.asarray(adapter[f"{name}.lora_{part}"][expert], np.float64) for part in "ab")
            np.testing.assert_allclose(value[expert], base[name][expert] + 3 * a @ b, rtol=1e-5, atol=1e-5)


def test_a_merged_layer_has_the_output_of_layer_plus_adapter() -> None:
    base, lora = tiny.random_params(NETWORK), LoRA(2, 4.0, r"^caption_projection\.fc2\.kernel$")
    adapter = adapter_of(lora)
    a, b = adapter.values()
    x = jnp.asarray(np.random.default_rng(1).standard_normal((5, a.shape[0]), np.float32))
    unmerged = bind(NETWORK, base).caption_projection.fc2(x) + lora.alpha / lora.rank * (x @ a) @ b
    merged = bind(NETWORK, lora.merge(base, adapter)).caption_projection.fc2(x)
    np.testing.assert_allclose(merged, unmerged, rtol=1e-4, atol=1e-4)
    assert not np.allclose(merged, bind(NETWORK, base).caption_projection.fc2(x), atol=0.1)


def test_rank_zero_disables_lora() -> None:
    assert make_lora(0, 8.0, "qkv") is None
    assert make_lora(2, 8, "x") == LoRA(2, 8.0, "x")


@pytest.mark.parametrize(
    ("rank", "alpha", "targets", "message"),
    [
        (-1, 8.0, "qkv", "must be positive"),
        (4, 0.0, "qkv", "must be positive"),
        (4, 8.0, "(qkv", "not a valid regular expression"),
        (4, 8.0, "no_such_kernel", "matches no kernel"),
        (4, 8.0, r"norm1\.scale$", "matches no kernel"),
        (64, 8.0, "qkv", "would not be smaller than"),
    ],
)
def test_invalid_adapters_are_rejected(rank: int, alpha: float, targets: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_lora(rank, alpha, targets).abstract(abstract_params(NETWORK))


def test_adapters_are_replicated() -> None:
    shapes = LoRA(2, 4.0, ATTENTION).abstract(abstract_params(NETWORK))
    mesh = meshes.make_mesh({"data": -1, "fsdp": 1, "expert": 1, "tensor": 1})
    places = param_shardings(mesh, shapes)
    assert set(places) == set(shapes)
    assert all(place.is_fully_replicated for place in places.values())
