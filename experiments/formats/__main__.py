"""Copies in the base's own form, and suspects that PyTorch, ONNX, Keras and TFLite make of them: which ones are traced.

Each section writes NAME.json and NAME.png into the output folder, and is skipped where they exist for the same
configuration and seed, so that an interrupted run resumes where it stopped. What is not installed leaves its cells
empty, with the reason. TensorFlow may be installed apart: name its interpreter in TENSORFLOW_PYTHON.
"""

from collections.abc import Sequence

from experiments.common import sections
from experiments.formats import commands, matrix

SECTIONS = {"matrix": matrix, "commands": commands}
_EXAMPLES = """sections:
  matrix    each network in its own form, each form of a suspect: T of the leaker, and who is accused
  commands  an ONNX base to the first copy, and a trace of an int8 suspect: seconds of each command

examples:
  python -m experiments.formats
  TENSORFLOW_PYTHON=~/tensorflow/bin/python python -m experiments.formats --config full
"""


def main(arguments: Sequence[str] | None = None) -> None:
    sections.main("formats", SECTIONS, __doc__, _EXAMPLES, arguments)


if __name__ == "__main__":
    main()
