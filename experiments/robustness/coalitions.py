"""Coalitions that average their copies and then rebuild them: how many are caught, and how many could be at all.

The mean of the copies is attacked by R0 (:mod:`experiments.robustness.rebuilding`), aligned, read and traced. The
limit is Shannon's: K colluders of N take log2 C(N, K) bits to name. A chip is the mean of K signs and noise, and tells
at most log2(1 + s) / 2 bits at the signal-to-noise ratio s measured, and no more than the entropy of that mean.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table
from scipy import special, stats

from experiments.common import networks, pipeline, sections
from experiments.common.networks import CUSTOMERS, Subject
from experiments.robustness import rebuilding
from smark_jax import aggregation, attacks, carriers, codes, embedding, models

_JITTER = {"Conv": 0.3}


@dataclasses.dataclass(frozen=True)
class Config:
    """For each number of chips, the numbers of colluders that are tried, in rising order, each with every seed."""

    cases: tuple[tuple[int, tuple[int, ...]], ...]
    seeds: int
    customers: int = CUSTOMERS
    epochs: int = 6
    train_images: int | None = None


QUICK = Config(((304, (2, 4, 8)), (1024, (4, 16))), seeds=1, epochs=4)
FULL = Config(
    (
        (304, (1, 2, 3, 4, 5, 7, 10, 14)),
        (1024, (1, 2, 3, 4, 5, 10, 20, 40)),
        (4096, (1, 2, 3, 4, 5, 10, 50, 100)),
    ),
    seeds=3,
)


def run(config: Config, seed: int, meter: sections.Meter) -> sections.Result:
    count = config.train_images or 4000
    meter.start(networks.steps(config.epochs, count) + sum(len(sizes) for _, sizes in config.cases) * config.seeds)
    step = lambda *_: meter.step("train the base")  # noqa: E731
    subject = networks.train(models.CNN(), seed, config.epochs, step, config.train_images)
    shape = networks.shape(subject)
    rows = []
    for num_chips, sizes in config.cases:
        key = networks.secret(seed, "coalitions", str(num_chips))
        mark = carriers.mark(key, subject.base, num_chips, shape=shape)
        book = codes.Codebook(key, config.customers, num_chips)
        for size in sizes:
            for trial in range(config.seeds):
                one = functools.partial(_trial, subject, mark, book, size, [seed, num_chips, size, trial])
                rows.append(meter.part(f"{num_chips}_{size}_{trial}", 0, one))
                meter.step(f"{num_chips} chips, {size} colluders: {rows[-1]['rebuilt']['caught']} caught after R0")
    return {"rows": rows, "accuracy": subject.accuracy(subject.base), "customers": config.customers}


def _trial(subject: Subject, mark: carriers.Mark, book: codes.Codebook, size: int, seed: list[int]) -> dict[str, Any]:
    """A coalition's mean copy, judged as it is and after R0."""
    guilty = np.random.default_rng(seed).choice(book.num_customers, size, replace=False)
    words = codes.codebook(book.key, guilty, mark.num_chips)
    copies = [embedding.embed(subject.base, mark, word) for word in words]
    mixed = attacks.average(aggregation.stack(copies)) if size > 1 else copies[0]
    key = jax.random.key(seed[-1])
    rebuilt = rebuilding.jitter_and_project(mixed, subject.apply_fn, subject.images[:1000], key, _JITTER)
    mean = np.asarray(words, np.float64).mean(axis=0)
    found: dict[str, Any] = {"chips": mark.num_chips, "colluders": size}
    for name, suspect in (("intact", mixed), ("rebuilt", rebuilt)):
        judged = pipeline.judge(suspect, subject.base, subject.apply_fn, subject.images[:1], mark, book)
        share = float(np.corrcoef(judged.chips, mean)[0, 1] ** 2)
        found[name] = {
            "caught": len(judged.accused & set(guilty.tolist())),
            "wrong": len(judged.accused - set(guilty.tolist())),
            "snr": share / max(1 - share, 1e-12),
            "accuracy": subject.accuracy(suspect),
        }
    return found


def bits_per_chip(colluders: int, snr: float) -> float:
    """The most that a chip can tell of who colludes: the mean of K signs, with noise."""
    signs = stats.binom.pmf(np.arange(colluders + 1), colluders, 0.5)
    return float(min(np.log2(1 + snr) / 2, -(signs * np.log2(np.maximum(signs, 1e-300))).sum()))


def limit(num_chips: int, customers: int, noise: float) -> int:
    """The largest K whose names fit into m chips; ``noise`` is a chip's noise power relative to a lone leaker's mark.

    The mark's power in a mean of K copies is 1 / K of that.
    """
    fits = 0
    for size in range(1, num_chips):
        names = (special.gammaln(customers + 1) - special.gammaln(size + 1)) / np.log(2)
        names -= special.gammaln(customers - size + 1) / np.log(2)
        if names > num_chips * bits_per_chip(size, 1 / (size * noise) if noise else np.inf):
            break
        fits = size
    return fits


def summary(result: sections.Result) -> list[dict[str, Any]]:
    """For each number of chips, the largest coalition of which all are caught each time, and the limit."""
    found = []
    for chips in sorted({row["chips"] for row in result["rows"]}):
        rows = [row for row in result["rows"] if row["chips"] == chips]
        for name in ("intact", "rebuilt"):
            whole = 0
            for size in sorted({row["colluders"] for row in rows}):
                if not all(row[name]["caught"] == size for row in rows if row["colluders"] == size):
                    break
                whole = size
            noise = float(np.median([1 / (row["colluders"] * row[name]["snr"]) for row in rows]))
            found.append(
                {
                    "chips": chips,
                    "suspect": name,
                    "all caught": whole,
                    "limit": limit(chips, result["customers"], noise),
                    "noise": noise,
                    "wrong": sum(row[name]["wrong"] for row in rows),
                    "accuracy": float(np.mean([row[name]["accuracy"] for row in rows])),
                }
            )
    return found


def show(console: rich.console.Console, result: sections.Result) -> None:
    table = rich.table.Table(
        *("chips", "suspect", "all caught up to", "limit", "noise", "innocents", "accuracy"),
        title=f"Coalitions among {result['customers']:,} customers; base accuracy {result['accuracy']:.3f}",
        title_justify="left",
    )
    for row in summary(result):
        table.add_row(
            *(f"{row['chips']:,}", row["suspect"], str(row["all caught"]), str(row["limit"])),
            *(f"{row['noise']:.2g}", str(row["wrong"]), f"{row['accuracy']:.3f}"),
        )
    console.print(table)


def picture(path: Path, result: sections.Result) -> None:
    chips = sorted({row["chips"] for row in result["rows"]})
    with sections.figure(path, 3 * len(chips), 2.8) as figure:
        for axes, m in zip(np.atleast_1d(figure.subplots(1, len(chips))), chips, strict=True):
            rows = [row for row in result["rows"] if row["chips"] == m]
            sizes = sorted({row["colluders"] for row in rows})
            for name, colour in (("intact", "tab:blue"), ("rebuilt", "tab:orange")):
                shares = [
                    np.mean([row[name]["caught"] / size for row in rows if row["colluders"] == size]) for size in sizes
                ]
                axes.plot(sizes, shares, "o-", color=colour, ms=4, label="after R0" if name == "rebuilt" else name)
            axes.set(title=f"{m:,} chips", xlabel="colluders", ylim=(-0.05, 1.05), xscale="log")
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.minorticks_off()
        figure.axes[0].set_ylabel("share of them caught")
        figure.axes[0].legend(frameon=False)
