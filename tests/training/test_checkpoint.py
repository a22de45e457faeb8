import errno
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from micro_dit.errors import UserError
from micro_dit.training.checkpoint import Checkpoints
from micro_dit.training.optimizer import make_optimizer
from micro_dit.training.state import TrainState

ROOT = Path(__file__).parents[2]
DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def state_at(step: int, ema: bool = True, width: int = 64) -> TrainState:
    """Returns a state with different values at every step."""
    params = {"layer.kernel": jnp.full((width, 64), step + 0.1), "layer.bias": jnp.arange(3.0) * step}
    average = jax.tree.map(lambda p: p - 0.05, params) if ema else None
    return TrainState(jnp.int32(step), params, make_optimizer(1.0).init(params), average)


def abstract(state: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=DEVICE), state)


def meta_at(step: int) -> dict[str, Any]:
    return {"step": step, "phase": 1, "images": 4 * step, "data": {"next_index": step}, "dollars": 0.5}


def saved(workdir: Path, steps: tuple[int, ...] = (1, 2, 3), **arguments: Any) -> Checkpoints:
    checkpoints = Checkpoints(workdir, **arguments)
    for step in steps:
        checkpoints.save(state_at(step), meta_at(step), wait=True)
    checkpoints.close()
    return Checkpoints(workdir, **arguments)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("checkpoints")
    saved(workdir).close()
    return workdir


@pytest.fixture
def workdir(template: Path, tmp_path: Path) -> Path:
    """A work directory with checkpoints of steps 2 and 3."""
    return Path(shutil.copytree(template, tmp_path / "run"))


def restore(checkpoints: Checkpoints, warn: Callable[[str], None] = pytest.fail, **like: Any) -> Any:
    return checkpoints.restore(lambda meta: abstract(state_at(meta["step"], **like)), warn=warn)


def test_a_restored_state_is_bitwise_identical(workdir: Path) -> None:
    state, meta = restore(Checkpoints(workdir))
    assert meta == meta_at(3)
    assert jax.tree.structure(state) == jax.tree.structure(state_at(3))
    jax.tree.map(np.testing.assert_array_equal, state, state_at(3))
    assert {leaf.sharding for leaf in jax.tree.leaves(state)} == {DEVICE}


def test_an_empty_folder_restores_nothing(tmp_path: Path) -> None:
    assert restore(Checkpoints(tmp_path)) is None


def test_the_newest_the_ends_of_phases_and_multiples_of_keep_every_are_kept(tmp_path: Path) -> None:
    assert saved(tmp_path, (1, 2, 3, 4, 5, 6, 7), keep_steps=(2,), keep_every=3).steps == [7, 6, 3, 2]


def test_a_step_is_saved_once(workdir: Path) -> None:
    checkpoints = Checkpoints(workdir)
    checkpoints.save(state_at(3), meta_at(3), wait=True)
    assert checkpoints.steps == [3, 2]


def _truncate_largest(folder: Path) -> None:
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)


def _empty_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def _remove_part(part: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / part)


@pytest.mark.parametrize(
    "damage",
    [
        _truncate_largest, _empty_files, _remove_part("params"), _remove_part("opt"), _remove_part("ema"),
        _remove_part("meta"), lambda folder: _truncate_largest(folder / "opt"),
        lambda folder: _truncate_largest(folder / "meta"),
    ],
    ids=["truncated", "emptied", "no params", "no optimizer", "no ema", "no meta", "truncated optimizer",
         "truncated meta"],
)  # fmt: skip
def test_a_damaged_checkpoint_is_skipped_with_a_warning(workdir: Path, damage: Callable[[Path], None]) -> None:
    damage(workdir / "checkpoints" / "3")
    warnings: list[str] = []
    checkpoints = Checkpoints(workdir)
    state, meta = restore(checkpoints, warnings.append)
    assert meta == meta_at(2)
    jax.tree.map(np.testing.assert_array_equal, state, state_at(2))
    (warning,) = warnings
    assert str(workdir / "checkpoints" / "3") in warning
    assert "Trying the previous checkpoint" in warning
    assert "\n" not in warning
    # The damaged checkpoint was moved, so that it is not lost and does not prevent later saves.
    assert (workdir / "unreadable_checkpoints" / "3").is_dir()
    for step in (3, 4):
        checkpoints.save(state_at(step), meta_at(step), wait=True)
    assert restore(checkpoints)[1] == meta_at(4)
    jax.tree.map(np.testing.assert_array_equal, checkpoints.load_params(3)[0], state_at(3).ema)


def test_a_run_does_not_restart_if_all_checkpoints_are_damaged(workdir: Path) -> None:
    for step in ("2", "3"):
        _truncate_largest(workdir / "checkpoints" / step)
    warnings: list[str] = []
    with pytest.raises(UserError, match=r"No checkpoint in .* can be read\. Move this folder away"):
        restore(Checkpoints(workdir), warnings.append)
    assert len(warnings) == 2


def test_a_checkpoint_of_another_network_is_rejected_with_the_parameter_name(workdir: Path) -> None:
    expected = r"does not match the config: params\.layer\.kernel is \(64, 64\) float32, expected \(32, 64\)"
    with pytest.raises(UserError, match=expected):
        restore(Checkpoints(workdir), width=32)


@pytest.mark.parametrize("part", ["params", "opt_state", "ema"])
def test_another_dtype_is_rejected(workdir: Path, part: str) -> None:
    def half(meta: dict[str, Any]) -> TrainState:
        like = abstract(state_at(3))
        halved = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=DEVICE), getattr(like, part)
        )
        return like._replace(**{part: halved})

    with pytest.raises(UserError, match=r"layer\.\w+ is .* float32, expected .* bfloat16"):
        Checkpoints(workdir).restore(half, warn=pytest.fail)


def test_another_optimizer_is_rejected(workdir: Path) -> None:
    def momentum(meta: dict[str, Any]) -> TrainState:
        like = state_at(3)
        return abstract(like._replace(opt_state=optax.trace(0.9).init(like.params)))

    with pytest.raises(UserError, match=r"missing opt\.trace\.layer\.bias.*unexpected opt\.1\.count"):
        Checkpoints(workdir).restore(momentum, warn=pytest.fail)


def test_only_the_training_process_removes_partial_checkpoints(workdir: Path) -> None:
    half_saved = workdir / "checkpoints" / "4.orbax-checkpoint-tmp"
    half_saved.mkdir()
    assert Checkpoints(workdir).steps == [3, 2]
    assert half_saved.exists()
    assert Checkpoints(workdir, clean=True).steps == [3, 2]
    deadline = time.monotonic() + 300  # Orbax removes it in the background
    while half_saved.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not half_saved.exists()


def test_ema_weights_are_loaded_by_default_if_there_are_any(workdir: Path) -> None:
    checkpoints = Checkpoints(workdir)
    params, meta = checkpoints.load_params()
    assert meta == meta_at(3)
    jax.tree.map(np.testing.assert_array_equal, params, state_at(3).ema)
    np.testing.assert_array_equal(checkpoints.load_params(2)[0]["layer.bias"], state_at(2).ema["layer.bias"])
    checkpoints.save(state_at(4, ema=False), meta_at(4), wait=True)
    jax.tree.map(np.testing.assert_array_equal, checkpoints.load_params()[0], state_at(4).params)


SAVES = """
import os, sys
from pathlib import Path
from micro_dit.training.checkpoint import Checkpoints
from tests.training.test_checkpoint import meta_at, state_at
checkpoints = Checkpoints(Path(sys.argv[1]))
for step in range(1, 26):
    checkpoints.save(state_at(step, width=32_768), meta_at(step), wait=True)  # 34 MB: four arrays of 8.4 MB
    print(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE"))
checkpoints.close()
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory in use from /proc")
def test_saves_do_not_leak_memory(tmp_path: Path) -> None:
    # A separate process is needed because memory of earlier tests may be freed in a shared one.
    command = [sys.executable, "-c", SAVES, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    used = [int(line) for line in done.stdout.split()]
    assert len(used) == 25
    # The first saves create threads and memory pools. Later, fragmentation adds 24 to 48 MB. If the 18 later states
    # leaked, they would add 612 MB.
    assert max(used[-3:]) - max(used[4:7]) < 100e6, [f"{size / 1e6:.0f} MB" for size in used]


def test_a_missing_checkpoint_is_reported_with_the_available_steps(workdir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no checkpoint of step 7\. Set --step to one of 2, 3"):
        Checkpoints(workdir).load_params(7)
    with pytest.raises(UserError, match=r"has no checkpoints\. Train for some steps first"):
        Checkpoints(tmp_path / "empty").load_params()


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left"), ValueError("RESOURCE_EXHAUSTED: No space left on device")]
)
@pytest.mark.parametrize("call", ["save_checkpointables_async", "wait"])
def test_a_full_disk_is_reported_as_a_user_error(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, call: str
) -> None:
    checkpoints = Checkpoints(workdir)

    def fail(*arguments: Any, **named: Any) -> None:
        raise failure

    monkeypatch.setattr(checkpoints._orbax, call, fail)
    with pytest.raises(UserError, match=r"disk of .* is full\. The newest complete checkpoint is step 3\. Free some"):
        checkpoints.save(state_at(4), meta_at(4))
    monkeypatch.undo()
    assert restore(checkpoints)[1] == meta_at(3)


def test_other_disk_errors_are_not_reported_as_a_full_disk(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(workdir)

    def fail(*arguments: Any, **named: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoints._orbax, "save_checkpointables_async", fail)
    with pytest.raises(OSError, match="Input/output"):
        checkpoints.save(state_at(4), meta_at(4))
