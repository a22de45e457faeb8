"""Estimates the cost of a training run: its FLOPs, and the time and dollars on a given chip at a given MFU.

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
    """Prints the estimated cost of the config given by the flags."""
    config = FLAGS.config
    if config is None:
        raise UserError("No config was given. Set --config, for example --config=configs/mask75.py:xl.")
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
    """Defines the command's flags."""
    config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/mask75.py:xl.")
    flags.DEFINE_enum("chip", "h100", list(CHIPS), "Type of the chips.")
    flags.DEFINE_integer("devices", 8, "Number of chips.", lower_bound=1)
    flags.DEFINE_float(
        "price_per_hour", None,
        "Dollars per chip-hour; by default cost.dollars_per_device_hour of the config, or the chip's list price.",
    )  # fmt: skip
    flags.DEFINE_float("mfu", None, "Model FLOPs utilization, in (0, 1]; by default cost.mfu of the config.")
    flags.DEFINE_bool("paper", False, "Also compare the estimate with the paper's table of costs.")
    flags.DEFINE_bool("json", False, "Print JSON instead of tables.")


if __name__ == "__main__":
    run_command(main, define_flags, takes_config=True)
