import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from micro_dit.models.dit import abstract_params
from micro_dit.training import optimizer as optimizers
from micro_dit.training.lora import LoRA
from micro_dit.training.optimizer import make_optimizer, newton_schulz, orthogonalize, update_ema
from micro_dit.training.state import TrainState, enter_phase
from tests.helpers import tiny

DECAY = 0.99975
PARAMS = {"a": np.asarray([[1.0, -2.0], [0.5, 3.0]]), "b": np.asarray([0.1, -0.4, 2.0])}
SETTINGS = dict(b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.1)


def gradients(step: int) -> dict[str, np.ndarray]:
    """Returns gradients that are clipped at even steps, where they are large, but not at odd steps."""
    generator = np.random.default_rng(step)
    scale = 3.0 if step % 2 == 0 else 0.01
    return {name: scale * generator.standard_normal(value.shape) for name, value in PARAMS.items()}


def reference(params: dict[str, np.ndarray], steps: int, clip: float, learning_rate: float) -> dict[str, np.ndarray]:
    """Returns parameters after AdamW in float64 (Loshchilov and Hutter 2019, algorithm 2) with clipped gradients."""
    first = {name: np.zeros_like(value) for name, value in params.items()}
    second = {name: np.zeros_like(value) for name, value in params.items()}
    for t in range(1, steps + 1):
        g = gradients(t - 1)
        norm = np.sqrt(sum((value**2).sum() for value in g.values()))
        updated = {}
        for name, p in params.items():
            clipped = g[name] * min(1.0, clip / norm)
            first[name] = 0.9 * first[name] + 0.1 * clipped
            second[name] = 0.99 * second[name] + 0.01 * clipped**2
            m, v = first[name] / (1 - 0.9**t), second[name] / (1 - 0.99**t)
            updated[name] = p - learning_rate * (m / (np.sqrt(v) + 1e-8) + 0.1 * p)
        params = updated
    return params


@pytest.mark.parametrize("clip", [0.25, 1e6])
def test_steps_agree_with_a_reference_implementation_of_adamw(clip: float) -> None:
    optimizer = make_optimizer(clip, **SETTINGS)
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), PARAMS)
    state = optimizer.init(params)
    for step in range(5):
        g = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), gradients(step))
        updates, state = optimizer.update(g, state, params)
        params = jax.tree.map(lambda p, u: p - 0.01 * u, params, updates)
    expected = reference(PARAMS, 5, clip, 0.01)
    for name in PARAMS:
        np.testing.assert_allclose(params[name], expected[name], rtol=2e-6)
        assert np.abs(expected[name] - PARAMS[name]).max() > 0.01


def test_the_state_structure_does_not_depend_on_the_settings() -> None:
    params = jax.tree.map(jnp.asarray, PARAMS)
    first, second = make_optimizer(0.25).init(params), make_optimizer(1.0, **SETTINGS).init(params)
    assert jax.tree.structure(first) == jax.tree.structure(second)


@pytest.mark.parametrize("fresh", [True, False])
def test_a_phase_keeps_or_resets_the_moments(fresh: bool) -> None:
    optimizer = make_optimizer(1.0)
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), PARAMS)
    g = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), gradients(0))
    _, used = optimizer.update(g, optimizer.init(params), params)
    state = TrainState(jnp.int32(7), params, used, None)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    entered = enter_phase(state, optimizer, with_ema=True, fresh_optimizer=fresh, sharding=device)
    expected = optimizer.init(params) if fresh else used
    jax.tree.map(np.testing.assert_array_equal, entered.opt_state, expected)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(used))
    assert int(entered.step) == 7
    jax.tree.map(np.testing.assert_array_equal, entered.params, params)
    # New EMA weights are a copy in separate memory, because the train step donates its arguments.
    jax.tree.map(np.testing.assert_array_equal, entered.ema, params)
    for name in PARAMS:
        assert entered.ema[name].unsafe_buffer_pointer() != entered.params[name].unsafe_buffer_pointer()
    assert enter_phase(entered, optimizer, False, False, device).ema is None


# ---- EMA -------------------------------------------------------------------------------------------------------------


def test_the_ema_follows_the_formula_in_float32_and_changes_at_every_step() -> None:
    generator = np.random.default_rng(0)
    start = params = generator.standard_normal(1000).astype(np.float32)
    ema = {"w": jnp.asarray(params)}
    expected = params.astype(np.float64)
    update = jax.jit(update_ema, static_argnames="decay")
    for _ in range(50):
        params = params + 0.01 * generator.standard_normal(1000).astype(np.float32)
        before = np.asarray(ema["w"])
        ema = update(ema, {"w": jnp.asarray(params)}, DECAY)
        expected = DECAY * expected + (1 - DECAY) * params
        assert np.mean(np.asarray(ema["w"]) != before) > 0.95
    assert ema["w"].dtype == jnp.float32
    change = np.linalg.norm(expected - start)
    assert np.linalg.norm(ema["w"] - expected) < 2e-3 * change


def test_the_ema_converges_to_constant_parameters() -> None:
    ema, params = {"w": jnp.zeros(3)}, {"w": jnp.full(3, 7.0)}
    after = jax.lax.fori_loop(0, 20_000, lambda _, ema: update_ema(ema, params, DECAY), ema)
    np.testing.assert_allclose(after["w"], 7 * (1 - DECAY**20_000), rtol=1e-4)


def test_an_inactive_ema_is_a_copy_of_the_parameters() -> None:
    ema, params = {"w": jnp.zeros(3)}, {"w": jnp.asarray([0.1, 1e-8, 3e7])}
    np.testing.assert_array_equal(update_ema(ema, params, DECAY, active=jnp.asarray(False))["w"], params["w"])
    np.testing.assert_array_equal(update_ema(ema, ema, DECAY, active=jnp.asarray(True))["w"], ema["w"])


# ---- Muon ------------------------------------------------------------------------------------------------------------


def matrices(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))


def test_newton_schulz_keeps_singular_vectors_and_equalizes_singular_values() -> None:
    X = matrices(3, 16, 40)
    U, _, Vh = np.linalg.svd(X, full_matrices=False)
    S = np.swapaxes(U, 1, 2) @ np.asarray(newton_schulz(X)) @ np.swapaxes(Vh, 1, 2)
    values = np.diagonal(S, axis1=1, axis2=2)
    assert np.all((values > 0.6) & (values < 1.25))
    assert np.abs(S - values[:, :, None] * np.eye(16)).max() < 1e-4
    assert not np.any(newton_schulz(jnp.zeros((1, 4, 4))))


def test_newton_schulz_agrees_with_optax() -> None:
    X = matrices(12, 20)
    optaxs = optax.contrib.scale_by_muon()
    first, _ = optaxs.update(X, optaxs.init(X))  # in the first step, the momentum is the gradient
    np.testing.assert_allclose(newton_schulz(X[None])[0], first, atol=1e-5)


def test_parts_of_fused_kernels_and_experts_are_orthogonalized_separately() -> None:
    name = "blocks.0.attn.qkv.kernel"
    updates = {
        name: matrices(8, 36), "blocks.0.cross_attn.kv.kernel": matrices(12, 24), "blocks.1.mlp.w1": matrices(2, 8, 12),
        "blocks.0.attn.proj.kernel": matrices(12, 8), "blocks.0.adaln.kernel": optax.MaskedNode(),
    }  # fmt: skip
    out = orthogonalize(updates)
    assert out["blocks.0.adaln.kernel"] == optax.MaskedNode()

    def expected_of(matrix: jax.Array) -> jax.Array:
        return optimizers.UPDATE_RMS * np.sqrt(max(matrix.shape)) * newton_schulz(matrix[None])[0]

    expected = {
        name: jnp.concatenate([expected_of(part) for part in jnp.split(updates[name], 3, axis=1)], axis=1),
        "blocks.0.cross_attn.kv.kernel": jnp.concatenate(
            [expected_of(part) for part in jnp.split(updates["blocks.0.cross_attn.kv.kernel"], 2, axis=1)], axis=1
        ),
        "blocks.1.mlp.w1": jnp.stack([expected_of(expert) for expert in updates["blocks.1.mlp.w1"]]),
        "blocks.0.attn.proj.kernel": expected_of(updates["blocks.0.attn.proj.kernel"]),
    }
    for kernel, value in expected.items():
        np.testing.assert_allclose(out[kernel], value, atol=1e-5, err_msg=kernel)
        assert 0.25 < float(jnp.sqrt(jnp.mean(out[kernel] ** 2))) < 0.45


def test_muon_updates_only_the_matrices_of_the_blocks() -> None:
    network = tiny.network(decoder_depth=1, decoder_dim=32, fusion=True, use_bias=True)
    groups = optimizers._muon_groups(abstract_params(network))
    muon = {name for name, group in groups.items() if group == "muon"}
    kernels = {"attn.qkv.kernel", "attn.proj.kernel", "cross_attn.q.kernel", "cross_attn.kv.kernel",
               "cross_attn.proj.kernel"}  # fmt: skip
    dense = {f"mlp.w{i}.kernel" for i in (1, 2, 3)}
    expected = {
        f"{block}.{kernel}" for block in ("mixer.0", "blocks.1", "fusion.blocks.0") for kernel in kernels | dense
    }
    expected |= {f"{block}.{k}" for block in ("mixer.1", "blocks.0") for k in kernels | {"mlp.w1", "mlp.w2"}}
    assert muon == expected


def test_muon_orthogonalizes_momentum_and_uses_adam_for_other_parameters() -> None:
    network = tiny.network()
    params = tiny.random_params(network)
    muon, adam = (make_optimizer(1e6, weight_decay=0.1, name=name) for name in ("muon", "adamw"))
    states, kernel = (muon.init(params), adam.init(params)), "blocks.1.cross_attn.q.kernel"
    momentum = jnp.zeros_like(params[kernel])
    for step in range(3):
        g = tiny.random_params(network, seed=step)
        updates, after = jax.jit(muon.update)(g, states[0], params)
        others, adams = jax.jit(adam.update)(g, states[1], params)
        states = after, adams
        momentum = 0.95 * momentum + g[kernel]
        expected = orthogonalize({kernel: g[kernel] + 0.95 * momentum})[kernel] + 0.1 * params[kernel]
        np.testing.assert_allclose(updates[kernel], expected, atol=2e-5)
        for name in ("blocks.0.mlp.gate.kernel", "final_layer.linear.kernel", "caption_block.attn.qkv.kernel"):
            np.testing.assert_allclose(updates[name], others[name], rtol=1e-6)


def test_muon_stores_one_moment_per_matrix() -> None:
    params = abstract_params(tiny.network())
    muon, adam = (jax.eval_shape(make_optimizer(1.0, name=name).init, params) for name in ("muon", "adamw"))
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(state)) for state in (muon, adam)]
    orthogonal = sum(params[name].size for name, group in optimizers._muon_groups(params).items() if group == "muon")
    assert sizes[1] - sizes[0] == orthogonal > 0


def test_muon_orthogonalizes_the_factors_of_an_adapter() -> None:
    base = tiny.random_params(tiny.network())
    params = LoRA(2, 4.0, r"attn\.(qkv|q|kv|proj)\.kernel$").init(base, jax.random.key(0))
    optimizer = make_optimizer(1e6, weight_decay=0.0, name="muon")
    g = {name: matrices(*p.shape) for name, p in params.items()}
    updates, _ = jax.jit(optimizer.update)(g, optimizer.init(params), params)
    a, b = (updates[f"blocks.0.attn.qkv.kernel{factor}"] for factor in (".lora_a", ".lora_b"))
    for factor in (a, *jnp.split(b, 3, axis=1)):
        values = np.linalg.svd(factor, compute_uv=False) / (optimizers.UPDATE_RMS * np.sqrt(max(factor.shape)))
        assert np.all((values > 0.6) & (values < 1.25))


def test_flops_of_newton_schulz_match_its_matrix_products() -> None:
    from tests.models.test_decoder import product_flops

    params = {name: abstract_params(tiny.network())[name] for name in ("blocks.0.mlp.w1", "blocks.1.attn.qkv.kernel")}
    jaxpr = jax.make_jaxpr(lambda updates: orthogonalize(updates))(params)
    assert optimizers.newton_schulz_flops(params) == sum(product_flops(jaxpr.jaxpr))
