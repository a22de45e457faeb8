"""The benchmarked programs on a tiny network; JAX's training step and sampler are only traced."""

import pytest

from benchmarks import jax_jobs
from benchmarks.contenders import Setting
from benchmarks.gpu import TINY

LAYERS = {"expert_layer_ms", "expert_dispatch_ms", "token_drop_ms"}
SETTING = Setting("Nano", TINY | {"input_size": 8}, 0.75, batch_size=4, microbatch=2, caption_tokens=4, steps=2)


def test_jax_jobs() -> None:
    training = jax_jobs.Training(SETTING)
    state, batch, _ = training.lower().in_avals[0]
    arguments = training.make_arguments()
    assert {name: a.shape for name, a in arguments[0].params.items()} == {k: a.shape for k, a in state.params.items()}
    assert {name: (a.shape, a.dtype) for name, a in arguments[1].items()} == {
        name: (a.shape, a.dtype) for name, a in batch.items()
    }
    sampled = jax_jobs.Sampling(SETTING).lower().out_info
    assert sampled.shape == (4, 8, 8, 4)
    layers = jax_jobs.Layers(SETTING)
    assert layers.prepare() == {"device": "cpu"}
    assert set(layers.run(times=1)) == LAYERS


def test_torch_jobs() -> None:
    pytest.importorskip("torch", reason="requires torch; run `pip install torch`")
    from benchmarks import torch_jobs

    for kind in (torch_jobs.Training, torch_jobs.Sampling):
        job = kind(SETTING)
        assert job.prepare()["compile_s"] > 0
        assert 0 < job.run(times=2)["wall_s"] < 60
    assert job.once().shape == (4, 4, 8, 8)
    layers = torch_jobs.Layers(SETTING)
    layers.prepare()
    assert set(layers.run(times=1)) == LAYERS
