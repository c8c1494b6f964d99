"""Uniqueness of fingerprints: every copy's statistics against all other customers' words, which must look like noise.

The control is a codebook in which words repeat: copies must then match innocents, and the same test must show it.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.console
from scipy import stats

from experiments.common import intervals, sections
from experiments.paper import common, report
from smark_jax import attacks, carriers, codes, embedding, extraction, statistics

_LEVELS = (0.1, 0.01, 1e-3, 1e-4, 1e-6)
_CONFIDENCE = 0.999
_COPIES_AT_ONCE = 10
_POINTS = 200


@dataclasses.dataclass(frozen=True)
class Config:
    """``copies`` go to the first of ``customers``; the control hands every word out ``repeated`` times."""

    copies: int
    customers: int
    epochs: int
    num_chips: int = 304
    strength: float = 0.03
    repeated: int = 10
    train_images: int | None = None
    data: str = "mnist_5k"


QUICK = Config(copies=20, customers=2_000, epochs=2)
FULL = Config(copies=200, customers=10_000, epochs=6)
_DAMAGE = {
    "intact": lambda copy: copy,
    "pruned 50 %": lambda copy: attacks.prune(copy, 0.5),
    "4 bits": lambda copy: attacks.quantise(copy, 4),
}


def run(config: Config, seed: int, meter: sections.Meter) -> sections.Result:
    meter.start(common.steps(config.data, config.epochs, config.train_images) + len(_DAMAGE) * config.copies)
    subject = common.train(common.DATA[config.data].network, config, seed, lambda *_: meter.step("the base"))
    base = subject.base
    key = common.secret(seed, "uniqueness")
    mark = carriers.mark(key, base, config.num_chips)
    words = np.asarray(codes.codebook(key, range(config.customers), config.num_chips))
    chips: dict[str, list[np.ndarray]] = {name: [] for name in _DAMAGE}
    for first in range(0, config.copies, _COPIES_AT_ONCE):
        some = words[first : min(first + _COPIES_AT_ONCE, config.copies)]
        copies = embedding.embed_batch(base, mark, some, config.strength)
        for name, damage in _DAMAGE.items():
            for row in range(len(some)):
                suspect = damage(jax.tree.map(lambda leaf, row=row: leaf[row], copies))
                chips[name].append(np.asarray(extraction.extract(suspect, base, mark), np.float64))
                meter.step(name)
    rows = [{"copies": name, **_against_others(np.stack(read), words)} for name, read in chips.items()]
    # The same copies, read by an owner who assigned the same few words repeatedly.
    again = np.tile(words[: -(-config.customers // config.repeated)], (config.repeated, 1))[: config.customers]
    rows.append({"copies": "control: words repeat", **_against_others(np.stack(chips["intact"]), again)})
    return {"num_chips": config.num_chips, "customers": config.customers, "data": config.data, "rows": rows}


def _against_others(chips: np.ndarray, words: np.ndarray) -> dict[str, Any]:
    """Statistics of M copies, those of the first M customers, against everybody else's words.

    Args:
      chips: shape [M, m].
      words: of all N customers, shape [N, m].
    """
    directions = np.stack([statistics.direction(y) for y in chips])
    found = directions @ words.T.astype(np.float64)
    own = np.diag(found).copy()
    others = found[~np.eye(*found.shape, dtype=bool)]
    levels = []
    for level in _LEVELS:
        bars = np.array([statistics.threshold(y, np.log(level)) for y in chips])
        above = int((np.abs(found) >= bars[:, None]).sum() - (np.abs(own) >= bars).sum())
        low, high = intervals.clopper_pearson(above, others.size, _CONFIDENCE)
        levels.append({"level": level, "above": above, "low": low, "high": high, "exceeded": low > level})
    # Ranks from both ends, dense in the tails: how often T is at least this large, compared with a normal variable.
    ranks = np.unique(np.geomspace(1, others.size / 2, _POINTS).astype(int))
    ranks = np.concatenate([ranks, others.size + 1 - ranks[::-1]])
    observed = np.sort(others)[ranks - 1]
    normal = stats.norm.ppf((ranks - 0.5) / others.size)
    return {
        "pairs": others.size,
        "mean": float(others.mean()),
        "variance": float(others.var()),
        "largest": float(np.abs(others).max()),
        "expected_largest": float(stats.norm.isf(0.5 / others.size)),
        "own_smallest": float(own.min()),
        "levels": levels,
        "bound_exceeded": any(row["exceeded"] for row in levels),
        "quantiles": [normal.tolist(), observed.tolist()],
    }


def tables(result: sections.Result) -> list[report.Table]:
    title = (
        f"Statistics of copies against all other words, m = {result['num_chips']}, N = {result['customers']:,} "
        f"({result['data']}); innocents have mean 0 and variance 1"
    )
    columns = ("copies", "pairs", "mean", "variance", "largest |T|", "of as many normal", "own T, smallest")
    first = report.Table(
        title,
        columns,
        [
            (
                row["copies"],
                f"{row['pairs']:,}",
                f"{row['mean']:+.4f}",
                f"{row['variance']:.4f}",
                f"{row['largest']:.2f}",
                f"{row['expected_largest']:.2f}",
                f"{row['own_smallest']:.2f}",
            )
            for row in result["rows"]
        ],
    )
    second = report.Table(
        f"Share of other customers whose p-value is at or below a level: at most the level if the bound holds "
        f"(exceeded: the {100 * _CONFIDENCE:g} % interval lies above it)",
        ("copies", *(f"p <= {level:g}" for level in _LEVELS), "bound"),
        [
            (
                row["copies"],
                *(f"{one['above'] / row['pairs']:.2g}" for one in row["levels"]),
                "exceeded" if row["bound_exceeded"] else "kept",
            )
            for row in result["rows"]
        ],
    )
    return [first, second]


def show(console: rich.console.Console, result: sections.Result) -> None:
    report.show(console, tables(result))


def picture(path: Path, result: sections.Result) -> None:
    """Quantiles of the statistics against those of the normal distribution."""
    with sections.figure(path, 5.4, 4.6) as figure:
        axes = figure.subplots()
        styles = (("#2c7fb8", "o"), ("#41ab5d", "s"), ("#d9a441", "^"), ("#c0392b", "x"))
        for row, (colour, marker) in zip(result["rows"], styles, strict=False):
            axes.plot(*row["quantiles"], marker, ms=3.5, c=colour, alpha=0.8, label=row["copies"])
        ends = [min(row["quantiles"][0][0] for row in result["rows"]), 0]
        ends[1] = -ends[0]
        axes.plot(ends, ends, c="0.3", lw=1, label="as if normal")
        axes.set_xlabel("quantile of the standard normal")
        axes.set_ylabel("statistic T of another customer")
        axes.legend(frameon=False, fontsize=8)
