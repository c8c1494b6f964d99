"""Trains the networks of the zoo on embedded digits, and prints their accuracy on 1,000 others."""

import time
from collections.abc import Sequence

import jax
import rich.console
import rich.progress
import rich.table

from experiments.common import networks, sections, zoo

_EXAMPLES = """examples:
  python -m experiments.common.zoo                                  # all of them: most of the time is compilation
  python -m experiments.common.zoo --only Swin "ViT, nnx" --epochs 10 --seed 3
"""


def main(arguments: Sequence[str] | None = None) -> None:
    registry = zoo.networks()
    parser = sections.parser("common.zoo", __doc__, _EXAMPLES)
    parser.add_argument("--only", nargs="+", choices=tuple(registry), metavar="NAME", default=tuple(registry))
    parser.add_argument("--epochs", type=sections.whole(1), default=3, help="over the images (default: 3)")
    parser.add_argument("--images", type=sections.whole(64, 4000), default=4000, help="to train on (default: 4000)")
    options = parser.parse_args(arguments)
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=140)
    table = rich.table.Table("network", "weights", "accuracy", "seconds", "structure", "paper")
    steps = networks.steps(options.epochs, options.images)
    with rich.progress.Progress(*rich.progress.Progress.get_default_columns(), console=console) as progress:
        task = progress.add_task("", total=steps * len(options.only))
        for name in options.only:
            progress.update(task, description=name)
            entry, began = registry[name], time.perf_counter()
            subject = networks.train(
                entry.network, options.seed, options.epochs, lambda *_: progress.advance(task), options.images
            )
            jax.block_until_ready(subject.base)
            seconds = time.perf_counter() - began
            accuracy = subject.accuracy(subject.base)
            table.add_row(name, f"{entry.weights:,}", f"{accuracy:.1%}", f"{seconds:.0f}", entry.about, entry.paper)
    console.print(table)


if __name__ == "__main__":
    main()
