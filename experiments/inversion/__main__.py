"""Gradient inversion: reconstructs digits from parties' messages: unmasked, masked, and summed.

Each section writes NAME.json and NAME.png into the output folder, and is skipped where they exist for the same
configuration and seed, so that an interrupted run resumes where it stopped.
"""

from collections.abc import Sequence

from experiments.common import sections
from experiments.inversion import single, sums

SECTIONS = {"single": single, "sums": sums}
_EXAMPLES = """sections:
  single  one party's gradient of one digit, unmasked and masked; are masked words uniform?
  sums    the sum over 1 to 32 parties, which masked aggregation does reveal

examples:
  python -m experiments.inversion
  python -m experiments.inversion --only sums --seed 7
  python -m experiments.inversion --config full --out out/inversion/full
"""


def main(arguments: Sequence[str] | None = None) -> None:
    sections.main("inversion", SECTIONS, __doc__, _EXAMPLES, arguments)


if __name__ == "__main__":
    main()
