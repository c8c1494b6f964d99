"""Licences: whether an owner can frame a customer, whether leakers are convicted by their own word, and what it costs.

Each section writes NAME.json and NAME.png into the output folder, and is skipped where they exist for the same
configuration and seed, so that an interrupted run resumes where it stopped. Words that customers draw come from the
operating system, so that readings differ a little from run to run.
"""

from collections.abc import Sequence

from experiments.common import sections
from experiments.licence import framing, guilt, price

SECTIONS = {module.__name__.rpartition(".")[2]: module for module in (framing, guilt, price)}
_EXAMPLES = """sections:
  framing  malicious owners against innocent customers at alpha = 0.1, and controls that must fail
  guilt    leakers and coalitions after attacks on two networks: T of their secret words, an eighth or all opened
  price    seconds of each step and sizes of packages; eight disputes about one licence, and a ninth

guilt and price use EfficientNet-Lite0, which needs the extra real.

examples:
  python -m experiments.licence
  python -m experiments.licence --only framing
  python -m experiments.licence --config full --out out/licence/full
"""


def main(arguments: Sequence[str] | None = None) -> None:
    sections.main("licence", SECTIONS, __doc__, _EXAMPLES, arguments)


if __name__ == "__main__":
    main()
