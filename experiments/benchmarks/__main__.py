"""Compares smark_jax with a PyTorch version of the same system and with the machine's limits, in one run.

Each side works in its own process, on the same cores; the sides take turns, one lap at a time. Measure on an idle
machine; ratios transfer to other machines better than seconds. Without PyTorch (extra ``bench``), smark_jax runs alone.
A section writes NAME.json and NAME.png into the output folder, and is skipped where they exist for the same
configuration and seed; an interrupted section resumes where it stopped.
"""

from collections.abc import Sequence

from experiments.benchmarks import commands, compare, scaling, shape_cost
from experiments.common import sections

SECTIONS = {"compare": compare, "scaling": scaling, "shape_cost": shape_cost, "commands": commands}
_EXAMPLES = """sections:
  compare     what was aimed at, case by case: training step, carrier, copies on disk, verdict, models of real size
  scaling     time against weights, chips, customers, copies and parties, with fitted exponents
  shape_cost  marks with a shape: seconds to make one, its room beside the model, memory to make and read a copy
  commands    CPU seconds and peak memory of each command of smark, among 3 customers and among many

examples:
  python -m experiments.benchmarks
  python -m experiments.benchmarks --only scaling
  python -m experiments.benchmarks --config full --out out/benchmarks/full
"""


def main(arguments: Sequence[str] | None = None) -> None:
    sections.main("benchmarks", SECTIONS, __doc__, _EXAMPLES, arguments)


if __name__ == "__main__":
    main()
