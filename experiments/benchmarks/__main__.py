"""Compares smark_jax with a PyTorch version of the same system and with the machine's limits, in one run.

Each side works in its own process, on the same cores; the sides take turns, one lap at a time. Measure on an idle
machine; ratios transfer to other machines better than seconds. Without PyTorch (extra ``bench``), smark_jax runs alone.
A section writes NAME.json and NAME.png into the output folder, and is skipped where they exist for the same
configuration and seed; an interrupted section resumes where it stopped.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

from experiments.benchmarks import accelerator, accelerator_report, commands, compare, race, scaling, shape_cost
from experiments.common import sections

SECTIONS = {
    "compare": compare,
    "scaling": scaling,
    "shape_cost": shape_cost,
    "commands": commands,
    "accelerator": accelerator,
}
_ALWAYS = ("compare", "scaling", "shape_cost", "commands")
_EXAMPLES = """sections:
  compare      what was aimed at, case by case: training step, carrier, copies on disk, verdict, models of real size
  scaling      time against weights, chips, customers, copies and parties, with fitted exponents
  shape_cost   marks with a shape: seconds to make one, its room beside the model, memory to make and read a copy
  commands     CPU seconds and peak memory of each command of smark, among 3 customers and among many
  accelerator  only when named: a GPU or TPU checked against references on the host, and timed beside its own limits;
               exit status 1 if it computes anything wrong; the quick sizes where there is no accelerator

examples:
  python -m experiments.benchmarks
  python -m experiments.benchmarks --only scaling
  python -m experiments.benchmarks --config full --out out/benchmarks/full
  python -m experiments.benchmarks --only accelerator --config full --results
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = sections.command_line("benchmarks", SECTIONS, __doc__, _EXAMPLES)
    parser.set_defaults(only=_ALWAYS)
    parser.add_argument("--results", action="store_true", help="write into experiments/benchmarks/results/DEVICE")
    options = parser.parse_args(arguments)
    if options.results and options.out:
        parser.error("--results and --out both name a folder: give one of them")
    if options.results:
        options.out = race.ROOT / "experiments/benchmarks/results" / accelerator.folder(race.devices().kind)

    def configure(config: Any) -> Any:
        without = config is accelerator.FULL and race.devices().platform == "cpu"
        return accelerator.QUICK if without else config

    out, _ = sections.run_sections("benchmarks", SECTIONS, options, configure)
    if "accelerator" in options.only:
        result = json.loads((out / "accelerator.json").read_text())["result"]
        sys.exit(1 if accelerator_report.faults(result) else 0)


if __name__ == "__main__":
    main()
