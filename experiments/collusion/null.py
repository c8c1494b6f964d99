"""The rate of false accusation, at a level high enough to be measured, and two flawed decoders as negative controls.

The negative controls are implemented here only. *Support minus j*: a pursuit selects customers, and each is tested on
the residual that leaves it out of the selected support, although the customer's word influenced the choice of that
support. For comparison, the same pursuit is run with true leave-one-out runs. *One-sided*: it accuses on large positive
statistics only, and so misses a colluder who enters an extrapolation negatively.
"""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import rich.console
import rich.table

from experiments.collusion import common
from experiments.common import intervals, sections
from smark_jax import codes, keys, statistics, tracing

ALPHA = 0.1
_SIDED_CHIPS, _SIDED_CUSTOMERS, _SIDED_COLLUDERS, _SIDED_ALPHA = 304, 1000, 5, 1e-6

ReadOut = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Config:
    trials: int
    control_trials: int
    num_chips: int = 48
    customers: int = 100
    colluders: int = 12
    noise: float = 0.3


QUICK = Config(trials=100, control_trials=100)
FULL = Config(trials=2500, control_trials=2000)


def _interleave(words: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    owner = rng.integers(len(words), size=words.shape[1])
    return words[owner, np.arange(words.shape[1])]


# The attacks of smark_jax.attacks, applied to chips instead of weights.
READ_OUTS: dict[str, ReadOut] = {
    "noise alone": lambda words, rng: np.zeros(words.shape[1]),
    "average": lambda words, rng: words.mean(axis=0),
    "median": lambda words, rng: np.median(words, axis=0),
    "interleave": _interleave,
    "extrapolate": lambda words, rng: common.extrapolation(len(words)) @ words,
    "min-max": lambda words, rng: (words.min(axis=0) + words.max(axis=0)) / 2,
}


def run(config: Config, seed: int, meter: sections.Meter) -> sections.Result:
    meter.start(len(READ_OUTS) * config.trials + 4 * config.control_trials)
    key = common.master_key(seed, "null")
    rows, alarms = [], 0
    for number, (name, attack) in enumerate(READ_OUTS.items()):
        rng = np.random.default_rng([seed, number])
        events, seconds = dict.fromkeys(common.DECODERS, 0), dict.fromkeys(common.DECODERS, 0.0)
        guilty = dict.fromkeys(common.DECODERS, 0)
        for trial in range(config.trials):
            book, coalition, y = _draw(config, keys.derive(key, name, str(trial)), attack, rng)
            for decoder in common.DECODERS:
                began = time.perf_counter()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", RuntimeWarning)  # decoy alarms are counted instead
                    verdict = tracing.trace(y, book, ALPHA, decoder, keep_statistics=False)
                seconds[decoder] += time.perf_counter() - began
                hit, innocent = common.caught(verdict, coalition)
                events[decoder] += innocent > 0
                guilty[decoder] += hit
                alarms += verdict.decoys.alarm
            meter.step(name)
        for decoder in common.DECODERS:
            row = _row(decoder, name, events[decoder], config.trials, seconds[decoder])
            rows.append({**row, "caught_mean": guilty[decoder] / config.trials})
    controls = []
    for number, name in enumerate(("noise alone", "average")):
        rng = np.random.default_rng([seed, 100 + number])
        counts, seconds = np.zeros(2, int), np.zeros(2)
        for trial in range(config.control_trials):
            book, coalition, y = _draw(config, keys.derive(key, "control", name, str(trial)), READ_OUTS[name], rng)
            for which, masked in enumerate((False, True)):
                began = time.perf_counter()
                counts[which] += bool(pursue_and_test(y, book, masked) - coalition)
                seconds[which] += time.perf_counter() - began
            meter.step(f"control, {name}")
        for which, control in enumerate(("support minus j", "leave one out")):
            controls.append(_row(control, name, int(counts[which]), config.control_trials, float(seconds[which])))
    sided = _one_sided(config.control_trials, key, np.random.default_rng([seed, 200]), meter)
    return {"alpha": ALPHA, "rows": rows, "decoy_alarms": alarms, "controls": controls, "one_sided": sided}


def _row(decoder: str, name: str, events: int, trials: int, seconds: float) -> sections.Result:
    low, high = intervals.clopper_pearson(events, trials)
    return {
        "decoder": decoder,
        "read_out": name,
        "trials": trials,
        "false_accusations": events,
        "rate": events / trials,
        "low": low,
        "high": high,
        "trials_per_second": round(trials / seconds, 1),
    }


def _draw(
    config: Config, key: keys.SecretKey, attack: ReadOut, rng: np.random.Generator
) -> tuple[np.ndarray, set[int], np.ndarray]:
    """A fresh codebook, a coalition in it (nobody where the read-out is noise alone) and the read-out."""
    book = np.asarray(codes.codebook(key, range(config.customers), config.num_chips))
    coalition = rng.choice(config.customers, config.colluders, replace=False)
    mixed = attack(book[coalition].astype(np.float64), rng)
    y = mixed + config.noise * rng.normal(size=config.num_chips)
    return book, set() if attack is READ_OUTS["noise alone"] else set(coalition.tolist()), y


def pursue_and_test(y: np.ndarray, book: np.ndarray, leave_one_out: bool) -> set[int]:
    """A plain orthogonal matching pursuit of fixed length; each selected customer tested with or without a rerun."""
    u, words = statistics.direction(y), book.astype(np.float64)
    length = u.size // 4
    selected = _pursue(u, words, length, None)
    level = math.log(ALPHA) - math.log(len(book))
    accused = set()
    for customer in selected:
        support = _pursue(u, words, length, customer) if leave_one_out else [k for k in selected if k != customer]
        residual = _residual(u, words[support])
        statistic = residual @ words[customer] / np.linalg.norm(residual)
        if float(statistics.log_p_value(statistic, residual)) <= level:
            accused.add(customer)
    return accused


def _pursue(u: np.ndarray, words: np.ndarray, length: int, masked: int | None) -> list[int]:
    selected: list[int] = []
    allowed = np.ones(len(words), bool)
    if masked is not None:
        allowed[masked] = False
    for _ in range(length):
        strength = np.abs(words @ _residual(u, words[selected])) * allowed
        selected.append(int(strength.argmax()))
        allowed[selected[-1]] = False
    return selected


def _residual(u: np.ndarray, words: np.ndarray) -> np.ndarray:
    return u - np.linalg.lstsq(words.T, u, rcond=None)[0] @ words if len(words) else u


def _one_sided(trials: int, key: keys.SecretKey, rng: np.random.Generator, meter: sections.Meter) -> sections.Result:
    """How often the colluder who enters negatively escapes a one-sided and the two-sided single decoder."""
    # A one-sided test may spend the whole level on one side: twice as much as a two-sided test.
    level = math.log(_SIDED_ALPHA) - math.log(_SIDED_CUSTOMERS)
    missed_one = missed_two = 0
    for trial in range(trials):
        words = np.asarray(
            codes.codebook(keys.derive(key, "sided", str(trial)), range(_SIDED_COLLUDERS), _SIDED_CHIPS), np.float64
        )
        y = common.extrapolation(_SIDED_COLLUDERS) @ words + 0.1 * rng.normal(size=_SIDED_CHIPS)
        statistic = float(statistics.direction(y) @ words[0])
        log_p = float(statistics.log_p_value(statistic, y))
        missed_two += log_p > level
        missed_one += statistic <= 0 or log_p - math.log(2) > level
        meter.step("control, one-sided", 2)
    return {
        "num_chips": _SIDED_CHIPS,
        "customers": _SIDED_CUSTOMERS,
        "colluders": _SIDED_COLLUDERS,
        "alpha": _SIDED_ALPHA,
        "trials": trials,
        "missed_by_one_sided": missed_one / trials,
        "missed_by_two_sided": missed_two / trials,
    }


def show(console: rich.console.Console, result: sections.Result) -> None:
    title = f"Trials that accuse anybody innocent, alpha = {result['alpha']:g} (99.9 % Clopper-Pearson)"
    table = rich.table.Table(title=title, title_justify="left")
    for column in ("decoder", "read-out", "rate", "interval", "trials", "trials/s", "verdict"):
        table.add_column(column, justify="left" if column in ("decoder", "read-out", "verdict") else "right")
    for row in (*result["rows"], *result["controls"]):
        broken, shown = row["low"] > result["alpha"], row["high"] <= result["alpha"]
        table.add_row(
            row["decoder"],
            row["read_out"],
            f"{row['rate']:.4f}",
            f"{row['low']:.3f} to {row['high']:.3f}",
            f"{row['trials']:,}",
            f"{row['trials_per_second']:.0f}",
            "[bold red]broken[/bold red]" if broken else "[green]within[/green]" if shown else "not broken",
        )
    console.print(table)
    sided = result["one_sided"]
    console.print(
        f"Control: who enters an extrapolation of {sided['colluders']} negatively escapes a one-sided score in "
        f"{100 * sided['missed_by_one_sided']:.1f} % of {sided['trials']:,} trials, the two-sided one in "
        f"{100 * sided['missed_by_two_sided']:.1f} %. Decoy alarms: {result['decoy_alarms']}."
    )


def picture(path: Path, result: sections.Result) -> None:
    rows = [*result["rows"], *result["controls"]]
    colours = {"joint": "#c0392b", "sequential": "#d9a441", "single": "#7f8c8d", "support minus j": "#000000"}
    with sections.figure(path, 8, 1.4 + 0.24 * len(rows)) as fig:
        axes = fig.subplots()
        for height, row in enumerate(rows):
            colour = colours.get(row["decoder"], "#2c6fa8")
            axes.plot([row["low"], row["high"]], [height] * 2, color=colour, lw=2)
            axes.plot(row["rate"], height, "o", color=colour, ms=5)
        axes.axvline(result["alpha"], color="0.2", lw=1, ls=":")
        axes.set_yticks(range(len(rows)), [f"{row['decoder']}, {row['read_out']}" for row in rows], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xlabel("trials that accuse anybody innocent (99.9 % interval); dotted: the promised bound")
        axes.set_title("False accusations, coalitions past capacity; below: the negative control", loc="left")
