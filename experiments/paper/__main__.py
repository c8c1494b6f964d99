"""The tables of a paper: the abstract's claims, and the field's usual comparisons.

Each section writes NAME.json and NAME.png into the output folder, and is skipped where they exist for the same
configuration and seed, so that an interrupted run resumes where it stopped. At the end tables.md is written from all
results in the folder.
"""

import argparse
import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from experiments.common import sections
from experiments.paper import common, comparators, fidelity, parties, report, summary, uniqueness
from smark_jax import data

SECTIONS = {
    "fidelity": fidelity,
    "parties": parties,
    "uniqueness": uniqueness,
    "comparators": comparators,
    "summary": summary,
}
_MOST_PARTIES = max(parties.FULL.parties)
_EXAMPLES = """sections:
  fidelity     accuracy, bit errors and p-values by length and strength, several base models
  parties      2 to 8 parties, data alike and not: masked, in the open, private; copies traced afterwards
  uniqueness   every copy's statistic against all other customers' words, and a control that fails
  comparators  Uchida, DeepMarks, a FedTracker-like fingerprint and ours, tuned, under the same attacks
  summary      figures of the other experiments, taken from their results

examples:
  python -m experiments.paper
  python -m experiments.paper --only comparators --seed 7
  python -m experiments.paper --config full --out experiments/paper/results
  python -m experiments.paper --config full --data cifar10      ResNet-18; downloads by TFDS, wants accelerators
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = sections.command_line("paper", SECTIONS, __doc__, _EXAMPLES)
    parser.add_argument("--data", choices=tuple(common.DATA), default="mnist_5k", help="cifar10: by TFDS, ResNet-18")
    options = parser.parse_args(arguments)
    with contextlib.suppress(RuntimeError):  # raised if computation has begun; the caller then keeps its devices
        jax.config.update("jax_num_cpu_devices", _MOST_PARTIES)
    _need(parser, options.data)

    def configure(config: Any) -> Any:
        if isinstance(config, summary.Config):
            return summary.current(config)
        return for_data(config, options.data)

    out, console = sections.run_sections("paper", SECTIONS, options, configure)
    console.print(f"Tables in {report.write(out, SECTIONS)}")


def for_data(config: Any, dataset: str) -> Any:
    """The configuration for another data set: longer training; all images but those held out."""
    config = dataclasses.replace(config, data=dataset, epochs=config.epochs * common.DATA[dataset].longer)
    if dataset != "mnist_5k" and hasattr(config, "held_out"):
        images = len(data.load(dataset, "train").labels)
        return dataclasses.replace(config, train_images=images - config.held_out)
    return config


def _need(parser: argparse.ArgumentParser, dataset: str) -> None:
    """Refuses, before anything is computed, a data set that is not available."""
    try:
        data.load(dataset, "test[:1]")
    except (OSError, ImportError) as error:
        parser.error(
            f"--data {dataset}: expected a data set that is on this machine or that TFDS can download. {error}\n"
            "On a machine with network: pip install 'smark-jax[tfds]', then run the same command there, or copy its "
            "TFDS_DATA_DIR here; without, use --data mnist_5k."
        )


if __name__ == "__main__":
    main()
