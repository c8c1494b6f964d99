"""Payloads of 304 bits in images, leaks traced by labels alone, and the number of probes needed.

Each section writes NAME.json and NAME.png into the output folder, and is skipped where they exist for the same
configuration and seed, so that an interrupted run resumes where it stopped.
"""

from collections.abc import Sequence

from experiments.blackbox import answers, payloads, subsets
from experiments.common import sections

SECTIONS = {"payloads": payloads, "answers": answers, "subsets": subsets}
_EXAMPLES = """sections:
  payloads  304 bits in digits, faces and natural-like images: PSNR, bit errors, accuracy; after noise and JPEG; against
            spread spectrum and a learned encoder
  answers   copies that answer probes each in their own way: traced by labels, attacked, at what cost
  subsets   how many probes a query takes, by how many of them a suspect answers as its copy was taught

examples:
  python -m experiments.blackbox
  python -m experiments.blackbox --only payloads
  python -m experiments.blackbox --config full --out out/blackbox/full
"""


def main(arguments: Sequence[str] | None = None) -> None:
    sections.main("blackbox", SECTIONS, __doc__, _EXAMPLES, arguments)


if __name__ == "__main__":
    main()
