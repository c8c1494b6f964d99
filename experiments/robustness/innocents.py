"""Suspects that are nobody's copy, read by weights that follow the suspect: how often is anybody accused?

The bound holds for every reading that does not depend on the codewords. A control whose weights see the codeword that
they are tested against must break it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
from jax import Array

from experiments.common import intervals, networks, sections
from experiments.common.networks import Subject
from experiments.robustness import rebuilding
from smark_jax import attacks, carriers, codes, extraction, models, statistics, tracing
from smark_jax._types import PyTree
from smark_jax.carriers import hadamard, selection, shapes
from smark_jax.extraction import weighting

KINDS = ("unrelated network", "fine-tuned base", "base after R0")


@dataclasses.dataclass(frozen=True)
class Config:
    """``suspects`` in all, each with a code of its own; those of a kind come from ``sources`` trained networks.

    The control looks at ``control`` suspects.
    """

    suspects: int
    control: int
    sources: int = 3
    epochs: int = 6
    customers: int = 20
    num_chips: int = 128
    alpha: float = 0.1
    train_images: int | None = None


QUICK = Config(300, control=60, epochs=3)
FULL = Config(2000, control=200)


def run(config: Config, seed: int, meter: sections.Meter) -> sections.Result:
    count = config.train_images or 4000
    meter.start(networks.steps(config.epochs * (1 + config.sources), count))
    train = functools.partial(networks.train, models.CNN(), epochs=config.epochs, train_images=config.train_images)
    subject = train(seed, on_progress=lambda *_: meter.step("train the base"))
    key = networks.secret(seed, "innocents", "carrier")
    mark = carriers.mark(key, subject.base, config.num_chips, shape=networks.shape(subject))
    sources = [_sources(subject, number, seed, train, meter) for number in range(config.sources)]
    meter.start(config.suspects)
    rows: list[dict[str, Any]] = [{"kind": kind, "suspects": 0, "accused": 0} for kind in KINDS]
    control = {"suspects": 0, "accused": 0}
    for number in range(config.suspects):
        row, rng = rows[number % len(rows)], np.random.default_rng([seed, number])
        source = sources[rng.integers(config.sources)][row["kind"]]
        suspect = attacks.add_noise(source, jax.random.key(seed * config.suspects + number), rng.uniform(0.01, 0.3))
        chips = np.asarray(extraction.extract(suspect, subject.base, mark), np.float64)
        code = networks.secret(seed, "innocents", "code", str(number))
        words = np.asarray(codes.codebook(code, range(config.customers), config.num_chips))
        row["suspects"] += 1
        row["accused"] += bool(tracing.trace(chips, words, config.alpha).accused)
        if number < config.control:
            control["suspects"] += 1
            control["accused"] += _accused_by_control(suspect, subject.base, mark, words, config.alpha)
        meter.step(row["kind"])
    return {"rows": rows, "control": control, "alpha": config.alpha, "customers": config.customers}


def _sources(
    subject: Subject, number: int, seed: int, train: Callable[..., Subject], meter: sections.Meter
) -> dict[str, PyTree]:
    """A model of each kind, to which noise is added."""
    other = train(seed + 1 + number, on_progress=lambda *_: meter.step("train an unrelated network"))
    tuned = attacks.fine_tune(
        subject.base, subject.apply_fn, subject.images, subject.labels, epochs=1, seed=seed + number
    )
    images, key = subject.images[:1000], jax.random.key(seed + number)
    projected = rebuilding.jitter_and_project(subject.base, subject.apply_fn, images, key, {"Conv": 0.3})
    return dict(zip(KINDS, (other.base, tuned, projected), strict=True))


def _accused_by_control(suspect: PyTree, base: PyTree, mark: carriers.Mark, words: np.ndarray, alpha: float) -> bool:
    """Whether a reading accuses somebody that believes coordinates twice as much where they agree with the codeword."""
    leaves = functools.partial(selection.carrying, "innocents", spec=mark.spec)
    values, _, _ = weighting.parts(leaves(params=suspect), leaves(params=base), mark)
    assert mark.shape is not None
    vector = shapes.join(values, mark.shape, mark.carrier.num_weights)
    for word in words:
        chips = np.asarray(_seeing(vector, mark.carrier, jnp.asarray(word, jnp.float32)), np.float64)
        level = math.log(alpha / len(words))
        if abs(statistics.direction(chips) @ word) >= statistics.threshold(chips, level):
            return True
    return False


@jax.jit
def _seeing(vector: Array, carrier: carriers.Carrier, word: Array) -> Array:
    agrees = vector * hadamard.spread(word, carrier) > 0
    return hadamard.despread(jnp.where(agrees, 2 * vector, vector), carrier)


def show(console: rich.console.Console, result: sections.Result) -> None:
    table = rich.table.Table(
        *("suspects", "number", "with somebody accused", "99.9 % interval"),
        title=f"{result['customers']} innocent customers, alpha = {result['alpha']:g}",
        title_justify="left",
    )
    for row in [*result["rows"], {"kind": "control: weights see the codeword", **result["control"]}]:
        low, high = intervals.clopper_pearson(row["accused"], row["suspects"])
        share = row["accused"] / row["suspects"]
        table.add_row(row["kind"], f"{row['suspects']:,}", f"{share:.1%}", f"{low:.1%} to {high:.1%}")
    console.print(table)


def picture(path: Path, result: sections.Result) -> None:
    rows = [*result["rows"], {"kind": "control", **result["control"]}]
    with sections.figure(path, 6, 2.6) as figure:
        axes = figure.subplots()
        for number, row in enumerate(rows):
            low, high = intervals.clopper_pearson(row["accused"], row["suspects"])
            axes.plot([low, high], [number, number], color="tab:blue")
            axes.plot(row["accused"] / row["suspects"], number, "o", color="tab:blue")
        axes.axvline(result["alpha"], color="0.4", lw=1)
        axes.set(yticks=range(len(rows)), yticklabels=[row["kind"] for row in rows], xlabel="somebody is accused")
        axes.invert_yaxis()
