"""Copies under attack: which ones can still be traced.

Each section writes NAME.json and NAME.png into the output folder, and is skipped where they exist for the same
configuration and seed, so that an interrupted run resumes where it stopped.
"""

from collections.abc import Sequence

from experiments.common import sections
from experiments.robustness import (
    architectures,
    coalitions,
    innocents,
    real_networks,
    real_rewrites,
    removal,
    rewrites,
    strength,
    suite,
)

SECTIONS = {
    "rewrites": rewrites,
    "removal": removal,
    "strength": strength,
    "suite": suite,
    "coalitions": coalitions,
    "innocents": innocents,
    "real_networks": real_networks,
    "real_rewrites": real_rewrites,
    "architectures": architectures,
}
_EXAMPLES = """sections:
  rewrites  random compositions of rewrites that leave the function alone, on three networks, with and without alignment
  removal   every removal attack at several settings: accuracy kept and p-value
  strength  which layers to mark, and how strongly: accuracy lost against what is left after attacks
  suite     every attack on white and shaped marks: accuracy, cost relative to training from scratch, verdict
  coalitions
            averages of a coalition's copies, intact and rebuilt by R0: how many are caught, and Shannon's limit
  innocents suspects that are nobody's copy, read by weights that follow the suspect: how often anybody is accused
  real_networks
            EfficientNet-Lite0 and OpenNSFW: what copies cost on natural images, and what is left after attacks
            without labels (needs the extra real)
  real_rewrites
            the same two under random rewrites of every kind, and int8 (needs the extra real)
  architectures
            ViT, Swin, ConvNeXt and other networks of the zoo: random rewrites of every kind, damage, innocents

examples:
  python -m experiments.robustness
  python -m experiments.robustness --only removal
  python -m experiments.robustness --config full --out out/robustness/full
"""


def main(arguments: Sequence[str] | None = None) -> None:
    sections.main("robustness", SECTIONS, __doc__, _EXAMPLES, arguments)


if __name__ == "__main__":
    main()
