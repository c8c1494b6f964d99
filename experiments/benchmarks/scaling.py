"""How time grows with weights D, chips m, customers N, copies K and parties P, with fitted exponents."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.table

from experiments.benchmarks import compare, floor_side, race, tables
from experiments.benchmarks.race import Entry, Timing
from experiments.common import sections


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of each curve; ``rounds`` of a race, fewer where they would take more than ``seconds``.

    PyTorch takes part as far as its dense projection stays within ``dense_gigabytes``.
    """

    rounds: int
    seconds: float
    num_weights: tuple[int, ...]
    num_chips: tuple[int, ...]
    customers: tuple[int, ...]
    copies: tuple[int, ...]
    parties: tuple[int, ...]
    dense_gigabytes: float
    weights_of_chips: int = 900_000


QUICK = Config(
    3,
    2,
    num_weights=(10**5, 10**6, 10**7),
    num_chips=(304, 4096),
    customers=(10**3, 10**5, 10**6),
    copies=(1, 10, 100),
    parties=(2, 8),
    dense_gigabytes=1.3,
)
FULL = Config(
    5,
    10,
    num_weights=(10**5, 316_228, 10**6, 3_162_278, 10**7, 31_622_777, 10**8),
    num_chips=(304, 1024, 4096, 16_384, 65_536),
    customers=(10**3, 10**4, 10**5, 10**6, 10**7),
    copies=(1, 10, 100, 1000),
    parties=(2, 4, 8, 16, 32),
    dense_gigabytes=4,
)

# Time may grow like D log D, an exponent of at most this over the measured decades, and linearly in N and K.
_LIMIT = 1.1

# By curve: the parameter that grows, and the target for its exponent (None: no target).
CURVES = {"D": ("num_weights", _LIMIT), "m": ("num_chips", None), "N": ("num_customers", _LIMIT)}
CURVES |= {"K": ("num_copies", _LIMIT), "P": ("parties", None)}


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The e of ``seconds = c * size ** e``, by least squares of the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def run(config: Config, seed: int, meter: sections.Meter) -> sections.Result:
    setting = race.setting()
    points = _points(config, seed)
    tell = lambda note: meter.step(note, 0)  # noqa: E731
    meter.start(1 + len(points))
    rates = meter.part("rates", 0, lambda: compare.measured_rates(setting, tell))["rates"]
    meter.step("rates of the machine")
    known = floor_side.Rates(**rates)
    measure = functools.partial(race.race, setting=setting, rounds=config.rounds, seconds=config.seconds, on_lap=tell)
    timings = []
    for number, (curve, entries) in enumerate(points):
        found = meter.part(f"point {number}", 0, functools.partial(measure, entries))
        meter.step(f"{curve} = {entries[0].params[CURVES[curve][0]]:,}")
        for timing in found:
            timing |= {"curve": curve, "size": timing["params"][CURVES[curve][0]]}
            timing["floor"] = floor_side.floor(known, timing["case"], timing["arm"], timing["params"])
        timings += found
    machine = race.machine(setting, compare.ours(timings), seed)
    return {"machine": machine, "rates": rates, "fits": fits(timings), "timings": timings}


def _points(config: Config, seed: int) -> list[tuple[str, list[Entry]]]:
    """The races: for each point of each curve, smark_jax and, where it can, PyTorch."""

    def dense(num_weights: int, num_chips: int) -> bool:
        return 4 * num_weights * num_chips <= config.dense_gigabytes * 1e9

    points: list[tuple[str, list[Entry]]] = []
    for num_weights in config.num_weights:
        params = {"num_weights": num_weights, "num_chips": 304, "seed": seed}
        sides = ("jax", "torch") if dense(num_weights, 304) else ("jax",)
        points.append(("D", [Entry(side, "weights", params, ("spread", "despread", "embed")) for side in sides]))
    for num_chips in config.num_chips:
        params = {"num_weights": config.weights_of_chips, "num_chips": num_chips, "seed": seed}
        sides = ("jax", "torch") if dense(config.weights_of_chips, num_chips) else ("jax",)
        points.append(("m", [Entry(side, "weights", params, ("spread", "despread")) for side in sides]))
    for customers in config.customers:
        params = {"num_customers": customers, "num_chips": 304, "seed": seed}
        ours = Entry("jax", "verdict", {**params, "decoder": "single"})
        points.append(("N", [ours, Entry("torch", "verdict", params, ("blocks", "tables"))]))
    for copies in config.copies:
        params = {"num_copies": copies, "num_weights": compare.CNN_WEIGHTS, "num_chips": 304, "seed": seed}
        points.append(("K", [Entry(side, "copies", params) for side in ("jax", "torch")]))
    for parties in config.parties:
        params = {"parties": parties, "num_words": compare.CNN_WEIGHTS, "seed": seed}
        points.append(("P", [Entry("jax", "party", params)]))
    return points


def fits(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """The exponent of each arm over its whole curve, and over the curve's last two points."""
    lines: dict[tuple[str, str, str], list[Timing]] = {}
    for timing in timings:
        lines.setdefault((timing["curve"], timing["side"], timing["arm"]), []).append(timing)
    rows = []
    for (curve, side, arm), line in lines.items():
        sizes, seconds = [timing["size"] for timing in line], [timing["median"] for timing in line]
        if len(line) < 2:
            continue
        found, end = exponent(sizes, seconds), exponent(sizes[-2:], seconds[-2:])
        limit = CURVES[curve][1] if side == "jax" else None
        met = None if limit is None else found <= limit
        row = {"curve": curve, "side": side, "arm": arm, "sizes": sizes, "exponent": found, "last": end}
        rows.append({**row, "limit": limit, "met": met})
    return rows


def show(console: rich.console.Console, result: sections.Result) -> None:
    tables.show_machine(console, result)
    tables.show_timings(console, result["timings"])
    table = rich.table.Table(title="Fitted exponents: time = c size^e", title_justify="left")
    for column in ("curve", "side", "arm", "from", "to", "e", "e of the last two", "at most", "met"):
        table.add_column(column, justify="left" if column in ("curve", "side", "arm") else "right")
    for row in result["fits"]:
        met = {True: "[green]yes[/green]", False: "[bold red]no[/bold red]", None: "-"}[row["met"]]
        table.add_row(
            row["curve"],
            row["side"],
            row["arm"],
            f"{row['sizes'][0]:,}",
            f"{row['sizes'][-1]:,}",
            f"{row['exponent']:.2f}",
            f"{row['last']:.2f}",
            f"{row['limit']:g}" if row["limit"] else "-",
            met,
        )
    console.print(table)


def picture(path: Path, result: sections.Result) -> None:
    names = {"D": "weights D", "m": "chips m", "N": "customers N", "K": "copies K", "P": "parties P"}
    colours = {"jax": "#c0392b", "torch": "#2c6fa8"}
    markers = ("o", "s", "^")
    with sections.figure(path, 15, 4) as fig:
        for axes, (curve, name) in zip(fig.subplots(1, len(names)), names.items(), strict=True):
            arms: list[str] = []
            for fit in (row for row in result["fits"] if row["curve"] == curve):
                line = [
                    timing
                    for timing in result["timings"]
                    if (timing["curve"], timing["side"], timing["arm"]) == (curve, fit["side"], fit["arm"])
                ]
                if fit["arm"] not in arms:
                    arms.append(fit["arm"])
                sizes = [timing["size"] for timing in line]
                text = f"{'smark_jax' if fit['side'] == 'jax' else 'PyTorch'}, {fit['arm']}: {fit['exponent']:.2f}"
                style = {"color": colours[fit["side"]], "marker": markers[arms.index(fit["arm"]) % 3], "ms": 4}
                axes.plot(sizes, [timing["median"] for timing in line], lw=1, label=text, **style)
                if fit["side"] == "jax" and line[0]["floor"]:
                    axes.plot(sizes, [timing["floor"] for timing in line], color="0.6", lw=1, ls=":")
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel(name)
            few = sorted({timing["size"] for timing in result["timings"] if timing["curve"] == curve})
            tables.plain_ticks(axes.xaxis, few if curve in "mP" else None)
            tables.plain_ticks(axes.yaxis)
            if arms:
                axes.legend(frameon=False, fontsize=6)
        fig.axes[0].set_ylabel("seconds (dotted: the machine's floor)")
        fig.suptitle(tables.machine_line(result), fontsize=8)
