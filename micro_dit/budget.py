"""Estimates what a training run costs: FLOPs of the recipe, and time and dollars for a chip and MFU.

python -m micro_dit.budget --config=configs/mask75.py:xl --chip=h100 --price_per_hour=3.75 --mfu=0.45 --paper
"""

import json

from absl import flags
from ml_collections import config_flags

from micro_dit.cli import run_command
from micro_dit.errors import UserError
from micro_dit.planning.chips import CHIPS
from micro_dit.planning.cost import estimate_cost
from micro_dit.planning.networks import phase_networks
from micro_dit.planning.paper_costs import paper_rows, paper_table
from micro_dit.training.phases import make_phases, with_mask_ratio


def main() -> None:
    """Prints what the run of the flags should cost."""
    config = FLAGS.config
    if config is None:
        raise UserError("no config given; try --config=configs/mask75.py:xl.")
    phases = make_phases(with_mask_ratio(config.phases, config.masking.ratio))
    networks, tokens = phase_networks(phases, config.model, config.data)
    mfu = config.cost.mfu if FLAGS.mfu is None else FLAGS.mfu
    price = config.cost.dollars_per_device_hour or None if FLAGS.price_per_hour is None else FLAGS.price_per_hour
    run = estimate_cost(networks, phases, CHIPS[FLAGS.chip], FLAGS.devices, mfu, price, tokens)
    paper = paper_rows(networks, phases, tokens) if FLAGS.paper else None
    if FLAGS.json:
        about = {"chip": FLAGS.chip, "devices": run.devices, "mfu": mfu, "dollars_per_chip_hour": run.price}
        rows = [
            {
                "phase": cost.phase.name, "flops": cost.flops, "hours": cost.hours,
                "chip_hours": cost.hours * run.devices, "dollars": cost.dollars,
            }
            for cost in run.phases
        ]  # fmt: skip
        print(json.dumps(about | {"phases": rows} | ({"paper": paper} if paper else {}), indent=2))
        return
    print(run.table())
    if paper:
        print("\n" + paper_table(paper))


FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of the command."""
    config_flags.DEFINE_config_file("config", None, "The recipe, e.g. configs/mask75.py:xl.")
    flags.DEFINE_enum("chip", "h100", list(CHIPS), "What to train on.")
    flags.DEFINE_integer("devices", 8, "How many of them.", lower_bound=1)
    flags.DEFINE_float("price_per_hour", None, "Dollars per chip-hour; by default the config's, or the chip's.")
    flags.DEFINE_float("mfu", None, "Share of the peak that is reached; by default the config's cost.mfu.")
    flags.DEFINE_bool("paper", False, "Show the paper's table of costs beside ours.")
    flags.DEFINE_bool("json", False, "Print JSON.")


if __name__ == "__main__":
    run_command(main, define_flags, takes_config=True)
