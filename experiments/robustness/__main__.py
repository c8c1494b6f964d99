"""Copies under attack: which ones can still be traced.

Each section writes NAME.json and NAME.png into the output folder, and is skipped where they exist for the same
configuration and seed, so that an interrupted run resumes where it stopped.
"""

from collections.abc import Sequence

from experiments.common import sections
from experiments.robustness import removal, rewrites, strength

SECTIONS = {"rewrites": rewrites, "removal": removal, "strength": strength}
_EXAMPLES = """sections:
  rewrites  random compositions of rewrites that leave the function alone, on three networks, with and without alignment
  removal   every removal attack at several settings: accuracy kept and p-value
  strength  which layers to mark, and how strongly: accuracy lost against what is left after attacks

examples:
  python -m experiments.robustness
  python -m experiments.robustness --only removal
  python -m experiments.robustness --config full --out out/robustness/full
"""


def main(arguments: Sequence[str] | None = None) -> None:
    sections.main("robustness", SECTIONS, __doc__, _EXAMPLES, arguments)


if __name__ == "__main__":
    main()
