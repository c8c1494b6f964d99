"""Measurements on coalitions: what is traced, how often a false accusation occurs, and what tracing costs.

Each section writes NAME.json and NAME.png into the output folder, and is skipped where they exist for the same
configuration and seed, so that an interrupted run resumes where it stopped.
"""

from collections.abc import Sequence

from experiments.collusion import capability, codes, null, readings, real, roc, speed
from experiments.common import sections

SECTIONS = {
    module.__name__.rpartition(".")[2]: module for module in (capability, real, null, readings, codes, roc, speed)
}
_EXAMPLES = """sections:
  capability  largest coalition traced, by simulation, as in the table of docs/tracing.md
  real        copies of a CNN trained on digits, 1,000,000 customers, eight attacks
  null        how often anybody innocent is accused at alpha = 0.1; two negative controls
  readings    the same for verdicts at the desk: unrelated models, given maps, alignment, partial reads; a control
  codes       ours, BIBD, Tardos, Nuida and orthogonal codes on the same attacks
  roc         share of innocents with a p-value below x, against x
  speed       seconds and peak memory, each case in a process of its own

examples:
  python -m experiments.collusion
  python -m experiments.collusion --only null roc
  python -m experiments.collusion --config full --out out/collusion/full
  python -m experiments.collusion --only speed --fresh
"""


def main(arguments: Sequence[str] | None = None) -> None:
    sections.main("collusion", SECTIONS, __doc__, _EXAMPLES, arguments)


if __name__ == "__main__":
    main()
