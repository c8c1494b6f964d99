"""The share of innocents whose p-value is below x, plotted against x: the bound is the diagonal."""

import dataclasses
from pathlib import Path

import numpy as np
import rich.console
import rich.table

from experiments.collusion import common
from experiments.common import sections
from smark_jax import codes, keys, statistics, tracing

_POINTS = 200


@dataclasses.dataclass(frozen=True)
class Config:
    customers: int
    num_chips: int = 304
    read_outs: int = 1


QUICK = Config(customers=1_000_000)
FULL = Config(customers=10_000_000, read_outs=2)


def _read_outs(m: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Read-outs that depend on no innocent's word, from benign to hostile."""
    few = np.zeros(m)
    few[:8] = 1
    return {
        "normal noise": rng.normal(size=m),
        "signs (a whole word)": rng.choice([-1.0, 1.0], m),
        "heavy tails (Cauchy)": rng.standard_cauchy(m),
        "eight chips alone": few,
        "average of 30 words": rng.choice([-1.0, 1.0], (30, m)).mean(axis=0),
    }


def run(config: Config, seed: int, meter: sections.Meter) -> sections.Result:
    rng = np.random.default_rng(seed)
    key = common.master_key(seed, "roc")
    meter.start(5 * config.read_outs)
    curves: dict[str, np.ndarray] = {}
    grids: dict[str, list[list[float]]] = {}
    for number in range(config.read_outs):
        for name, y in _read_outs(config.num_chips, rng).items():
            book = codes.Codebook(keys.derive(key, name, str(number)), config.customers, config.num_chips)
            statistic = np.abs(tracing.trace(y, book, 1e-6, "single").statistics)
            statistic.sort()
            # p falls with |T|, so p <= p(t) exactly where |T| >= t (up to the rounding of float32 scores).
            levels = np.linspace(0.5, min(6.5, float(statistic[-1])), _POINTS)
            log_p = statistics.log_p_value(levels, y) / np.log(10)
            above = config.customers - np.searchsorted(statistic, levels * (1 - 1e-6), side="left")
            curves[name] = above
            grids.setdefault(name, []).extend([float(x), int(n)] for x, n in zip(log_p, above, strict=True))
            meter.step(name)
    rows = []
    for name, points in grids.items():
        # The tightest point of the curve that rests on at least 30 innocents.
        sound = [(x, n) for x, n in points if n >= 30]
        excess = max(np.log10(n / config.customers) - x for x, n in sound)
        x, n = min(sound)
        rows.append({"read_out": name, "largest_log10_excess": float(excess), "deepest": [x, n], "points": points})
    return {"innocents_per_curve": config.customers, "curves_each": config.read_outs, "rows": rows}


def show(console: rich.console.Console, result: sections.Result) -> None:
    table = rich.table.Table(title="Share of innocents with p <= x, over x (at most 1)", title_justify="left")
    for column in ("read-out", "innocents", "largest ratio", "at the smallest x seen 30 times"):
        table.add_column(column, justify="left" if column == "read-out" else "right")
    for row in result["rows"]:
        x, count = row["deepest"]
        table.add_row(
            row["read_out"],
            f"{result['innocents_per_curve'] * result['curves_each']:,}",
            f"{10 ** row['largest_log10_excess']:.3f}",
            f"{count / result['innocents_per_curve']:.2g} at x = {10**x:.2g}",
        )
    console.print(table)


def picture(path: Path, result: sections.Result) -> None:
    with sections.figure(path, 6.5, 5.5) as fig:
        axes = fig.subplots()
        total = result["innocents_per_curve"]
        for row in result["rows"]:
            points = np.array(row["points"]).reshape(result["curves_each"], -1, 2)[0]
            seen = points[:, 1] >= 1
            axes.loglog(10 ** points[seen, 0], points[seen, 1] / total, lw=1.6, label=row["read_out"])
        axes.loglog([0.2 / total, 1], [0.2 / total, 1], color="0.2", ls=":", label="the bound")
        axes.set_xlabel("x")
        axes.set_ylabel("share of innocents with p-value at most x")
        axes.set_title(f"False accusations against the bound, {total:,} innocents a curve", loc="left", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
