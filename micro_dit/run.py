"""Prepares a run for its first step: checks the config, prints the plan, and restores or initializes the state.

Only this module, train.py and the commands read configs. The modules they call have plain arguments.
"""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from micro_dit.data.shards import Manifest
from micro_dit.diffusion.generate import Sampling
from micro_dit.errors import UserError
from micro_dit.evaluation.during_training import EvaluationSettings, ImageMetrics, TrainingEvaluation
from micro_dit.models.config import DiTConfig
from micro_dit.models.dit import abstract_params
from micro_dit.parallel import mesh as meshes
from micro_dit.parallel import sharding
from micro_dit.parallel.distributed import main_first
from micro_dit.planning.chips import Chip, chip_of, measure_chip
from micro_dit.planning.cost import estimate_cost
from micro_dit.planning.report import parameter_table
from micro_dit.training.checkpoint import Checkpoints, Meta
from micro_dit.training.phases import Phase, make_phases, phase_starts, with_mask_ratio
from micro_dit.training.pretrained import Start, has_checkpoints, load_start, load_under, place
from micro_dit.training.profiler import ProfileSettings
from micro_dit.training.recipe import Recipe, make_recipe
from micro_dit.training.shards import TrainingData, prepare_shards
from micro_dit.training.state import TrainState, init_state, state_from
from micro_dit.training.step import abstract_train_state, network_of
from micro_dit.training.workdir import claim_workdir


@dataclasses.dataclass(frozen=True)
class Run:
    """A run whose settings have been validated.

    Attributes:
        config: The config, with masking.ratio applied to its phases.
        workdir: The work directory.
        mesh: Mesh of all devices.
        recipe: Settings that all phases share.
        phases: The training phases, in order.
        starts: Global step at which each phase starts, followed by the total number of steps.
        networks: Network configuration of each phase.
        manifests: Shard manifest of each phase.
        chip: Type of the devices, with its peak FLOP/s.
        profile: Steps to trace with the profiler.
        say: Prints a line on process 0 and does nothing on other processes.
    """

    config: Any
    workdir: Path
    mesh: jax.sharding.Mesh
    recipe: Recipe
    phases: tuple[Phase, ...]
    starts: list[int]
    networks: list[DiTConfig]
    manifests: list[Manifest]
    chip: Chip
    profile: ProfileSettings
    say: Callable[[str], None]

    def abstract_state(self, phase: int) -> TrainState:
        """Returns the shapes, dtypes and shardings of the train state in a phase."""
        return abstract_train_state(self.networks[phase], self.phases[phase], self.recipe, self.mesh)


def check(config: Any, workdir: Path) -> tuple[Run, Start | None]:
    """Validates the config, shards and initial weights, and claims the work directory.

    Returns:
        The run, and the initial weights named by `config.init_from`. The weights are None if the config names none or
        if the work directory already has checkpoints.

    Raises:
        UserError: The config, the shards or the work directory is invalid. Nothing has been written to the work
            directory in that case.
    """
    main_process = jax.process_index() == 0
    say: Callable[[str], None] = (lambda text: print(text, flush=True)) if main_process else (lambda text: None)
    config = copy.deepcopy(config)
    config.phases = with_mask_ratio(config.phases, config.masking.ratio)
    phases, recipe, mesh = make_phases(config.phases), make_recipe(config), meshes.make_mesh(config.mesh)
    profile = ProfileSettings(**config.profile)
    for phase in phases:
        recipe.check_batch(phase, mesh)
    manifests = main_first(lambda: prepare_shards(TrainingData(**config.data), phases, recipe.sigma_data, say))
    vae, text = manifests[0].vae, manifests[0].text_encoder
    networks = [network_of(phase, config.model, vae, text) for phase in phases]
    if recipe.path_drop and not networks[0].fusion:
        raise UserError(
            f"diffusion.path_drop is {recipe.path_drop}, but path drop requires a network with model.fusion. Set "
            "--config.diffusion.path_drop=0."
        )
    sharding.param_shardings(mesh, abstract_params(networks[0]))
    recipe.trainable(networks[0]).abstract()
    start = load_start(config.init_from) if config.init_from and not has_checkpoints(workdir) else None
    if start:
        start.check(networks[0], manifests[0], recipe.sigma_data, config.data.vae, config.data.text_encoder)
    shards = {
        "vae": vae.fingerprint, "text_encoder": text.fingerprint, "caption_tokens": text.tokens,
        "caption_cleaning": manifests[0].caption_cleaning, "attribution": manifests[0].attribution,
        "files": [manifest.fingerprint for manifest in manifests],
    }  # fmt: skip
    main_first(lambda: claim_workdir(workdir, config.to_dict(), shards) if main_process else None)
    chip = chip_of(jax.devices()[0].device_kind) or measure_chip()
    starts = phase_starts(phases)
    return Run(config, workdir, mesh, recipe, phases, starts, networks, manifests, chip, profile, say), start


def report_plan(run: Run) -> None:
    """Prints the parameter table, the sharding table, and the predicted time and cost."""
    params, cost = abstract_params(run.networks[0]), run.config.cost
    run.say(parameter_table(params))
    if run.mesh.size > 1:
        run.say(sharding.sharding_table(run.mesh, params))
    predicted = estimate_cost(
        run.networks, run.phases, run.chip, run.mesh.size, mfu=cost.mfu, price=cost.dollars_per_device_hour,
        caption_tokens=run.manifests[0].text_encoder.tokens,
    )  # fmt: skip
    run.say(predicted.table())


def restore_or_start(
    run: Run, start: Start | None, checkpoints: Checkpoints
) -> tuple[TrainState, Meta, dict[str, jax.Array] | None]:
    """Restores the newest readable checkpoint, or initializes the state of step 0 (from `start` if it is given).

    Returns:
        The train state on the devices, its metadata, and the frozen base parameters of a LoRA run on the devices (None
        without LoRA).
    """
    restored = checkpoints.restore(lambda meta: run.abstract_state(meta["phase"]), warn=run.say)
    if restored is not None:
        state, meta = restored[0], Meta.from_dict(restored[1])
        run.say(f"Resuming from step {meta.step} of {run.starts[-1]} ({checkpoints.folder / str(meta.step)})")
        start = load_under(meta.lora) if meta.lora else None
    else:
        places, phase = sharding.shardings_of(run.abstract_state(0)), run.phases[0]
        optimizer, with_ema = run.recipe.optimizer(phase), phase.ema_decay > 0
        if start and not run.recipe.lora:
            state, meta = state_from(place(start.params, places.params), optimizer, places, with_ema), Meta()
        else:
            trainable = run.recipe.trainable(run.networks[0])
            state = init_state(trainable, optimizer, run.config.seed, places, with_ema)
            meta = Meta(lora=start.under(run.recipe.lora) if start and run.recipe.lora else None)
        if start:
            run.say(f"Starting from the weights in {start}")
    if start is None or not meta.lora:
        return state, meta, None
    return state, meta, place(start.params, sharding.param_shardings(run.mesh, start.params))


def load_evaluation(run: Run) -> TrainingEvaluation:
    """Loads the data, encoders and settings that the evaluators of all phases share."""
    data, sampling, metrics = run.config.data, run.config.sampling, run.config.evaluation.to_dict()
    settings = EvaluationSettings(
        loss_every=run.config.evaluate_every, split=data.heldout, loss_images=data.heldout_images,
        previews_every=sampling.every, prompts=sampling.prompts,
        sampling=Sampling(sampling.steps, sampling.guidance, path_drop=sampling.path_drop),
        metrics_every=metrics.pop("every"), metrics=ImageMetrics(**metrics), vae=data.vae,
        text_encoder=data.text_encoder, sigma_data=run.recipe.sigma_data, dtype=run.recipe.dtype,
    )  # fmt: skip
    return TrainingEvaluation(settings, run.manifests[0], run.workdir, meshes.replicated(run.mesh), run.say)
