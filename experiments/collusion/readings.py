"""The rate of false accusation at the desk: unrelated models, maps chosen by an adversary, and so on.

No suspect is a copy, so every accusation is false. The vault's own functions read and judge the suspects. An adversary
who knows all codewords and the carrier supplies the map of the suspect's leaves that maximises some customer's
statistic (a linear assignment problem). The control uses that map without correcting for the number of maps.
"""

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
from scipy import optimize

from experiments.collusion import common
from experiments.common import intervals, sections
from smark_jax import carriers, codes, errors, files, keys, tracing
from smark_jax.vault import reading as desk

ALPHA = 0.1
_WIDTH = 16

Leaves = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Config:
    trials: int
    num_chips: int = 48
    customers: int = 20
    layers: int = 8
    rectify: bool = True


QUICK = Config(trials=100)
FULL = Config(trials=2000)


class Case(NamedTuple):
    """A model without customers' copies, the codewords of one trial, and the carrier as a matrix, shape [m, D]."""

    base: Leaves
    mark: carriers.Mark
    book: np.ndarray
    aligner: desk.Aligner
    rows: np.ndarray
    rectify: bool


class Reads(NamedTuple):
    """What a trial's suspect reads in one or several ways: chips, and the maps each was chosen from."""

    chips: list[np.ndarray]
    log_maps: list[float]


def _network(params: Any, x: Any) -> Any:
    for number in range(len(params)):
        x = jnp.tanh(x @ params[f"layer{number}"]["kernel"])
    return x


def case(config: Config, seed: int) -> Case:
    """Dense layers of one shape: nothing but content and names tells which is which."""
    rng = np.random.default_rng(seed)
    base = {f"layer{i}/kernel": _noise(rng) for i in range(config.layers)}
    mark = carriers.mark(common.master_key(seed, "readings"), files.nest(base), config.num_chips)
    book = np.empty((config.customers, config.num_chips))
    aligner = desk.Aligner("network", _network, np.zeros((1, _WIDTH), np.float32))
    rows = np.stack([np.asarray(carriers.spread(chip, mark)) for chip in np.eye(config.num_chips, dtype=np.float32)])
    return Case(base, mark, book, aligner, rows, config.rectify)


def _noise(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(_WIDTH, _WIDTH)).astype(np.float32)


def _read(leaves: Leaves, at: Case, reading: desk.Reading) -> Reads:
    """Chips by the desk's reading; none where nothing can be said of the suspect, who is then compared with nobody."""
    refused = (errors.NothingMatched, errors.Undecided)
    with contextlib.suppress(*refused):
        found = desk.read(leaves, at.base, at.mark, reading)
        return Reads([found.chips], [found.log_maps])
    return Reads([], [])


def unrelated(at: Case, rng: np.random.Generator) -> Reads:
    return _read({name: _noise(rng) for name in at.base}, at, _reading(at, rng))


def _reading(at: Case, rng: np.random.Generator) -> desk.Reading:
    return desk.Reading(rectify=at.rectify and bool(rng.integers(2)))


def given_map(at: Case, rng: np.random.Generator) -> Reads:
    suspect = {f"x{place}": _noise(rng) for place in range(len(at.base))}
    return _read(suspect, at, desk.Reading(given=best_map(suspect, at)))


def best_map(suspect: Leaves, at: Case) -> dict[str, str]:
    """The map by which some customer's word fits best: for each word and sign the best assignment and layouts."""
    best, answer = -np.inf, {}
    views = [
        (name, change, view) for name, leaf in suspect.items() for change, view in (("", leaf), ("transposed", leaf.T))
    ]
    columns = np.stack([view.reshape(-1) for *_, view in views])
    leaves, scales = at.mark.spec.leaves, np.array(at.mark.spec.scales)
    parts = zip(leaves, at.mark.spec.scales, strict=True)
    rows = np.stack([(at.base[leaf.path] / np.float32(scale)).reshape(-1) for leaf, scale in parts])
    for word in at.book:
        direction = (word @ at.rows).reshape(rows.shape)
        for sign in (1, -1):
            gains = sign * (direction @ columns.T / scales[:, None] - (direction * rows).sum(axis=1, keepdims=True))
            by_leaf = gains.reshape(len(rows), -1, 2)
            ours, theirs = optimize.linear_sum_assignment(by_leaf.max(axis=2), maximize=True)
            total = float(by_leaf.max(axis=2)[ours, theirs].sum())
            if total > best:
                best = total
                chosen = zip(ours.tolist(), theirs.tolist(), strict=True)
                which = {leaves[i].path: views[2 * j + int(by_leaf[i, j].argmax())] for i, j in chosen}
                answer = {path: f"{name}: {change}" for path, (name, change, _) in which.items()}
    return answer


def aligned(at: Case, rng: np.random.Generator) -> Reads:
    """The base, perturbed by noise and with its channels moved, read with alignment and without."""
    orders = [np.arange(_WIDTH), *(rng.permutation(_WIDTH) for _ in range(len(at.base) - 1)), np.arange(_WIDTH)]
    suspect = {
        name: (leaf + 0.3 * _noise(rng))[orders[place]][:, orders[place + 1]]
        for place, (name, leaf) in enumerate(at.base.items())
    }
    both = [_read(suspect, at, desk.Reading(aligner)) for aligner in (at.aligner, None)]
    return Reads(*(list(some[0]) + list(some[1]) for some in zip(*both, strict=True)))


def partial(at: Case, rng: np.random.Generator) -> Reads:
    """Some leaves are missing or of another shape, some weights are NaN, infinite or huge."""
    suspect = {name: leaf + 0.5 * _noise(rng) for name, leaf in at.base.items()}
    for name, kind in zip(list(suspect), rng.integers(6, size=len(suspect)), strict=True):
        odd = rng.random((_WIDTH, _WIDTH)) < 0.1
        if kind == 0:
            del suspect[name]
        elif kind == 1:
            suspect[name] = suspect[name][:, :3]
        elif kind < 5:
            suspect[name] = np.where(odd, np.float32((np.nan, -np.inf, 1e18)[kind - 2]), suspect[name])
    return _read(suspect, at, _reading(at, rng))


ARMS: dict[str, Callable[[Case, np.random.Generator], Reads]] = {
    "unrelated models": unrelated,
    "maps chosen by an adversary": given_map,
    "two readings, one aligned": aligned,
    "partial reads": partial,
}


def run(config: Config, seed: int, meter: sections.Meter) -> sections.Result:
    meter.start(len(ARMS) * config.trials)
    bare = case(config, seed)
    rows: list[sections.Result] = []
    control = compared = 0
    for number, (name, arm) in enumerate(ARMS.items()):
        events, compared = 0, 0
        began = time.perf_counter()
        for trial in range(config.trials):
            key = keys.derive(common.master_key(seed, "readings"), name, str(trial))
            at = bare._replace(book=np.asarray(codes.codebook(key, range(config.customers), config.num_chips)))
            reads = arm(at, np.random.default_rng([seed, number, trial]))
            compared += bool(reads.chips)
            events += accuses(reads, at.book, counted=True)
            if arm is given_map:
                control += accuses(reads, at.book, counted=False)
            meter.step(name)
        rows.append(_row(name, events, config.trials, compared, time.perf_counter() - began))
    control_row = _row("control: the same maps, not counted", control, config.trials, config.trials, 0)
    return {"alpha": ALPHA, "rows": [*rows, control_row]}


def accuses(reads: Reads, book: np.ndarray, counted: bool) -> bool:
    """Whether anybody is accused in any of the readings, all of which p-values count."""
    if not reads.chips:
        return False
    maps = reads.log_maps if counted else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # decoy alarms are expected
        found = tracing.trace_batch(np.stack(reads.chips), book, ALPHA, log_maps=maps, keep_statistics=False)
    return any(verdict.accused for verdict in found)


def _row(name: str, events: int, trials: int, compared: int, seconds: float) -> sections.Result:
    low, high = intervals.clopper_pearson(events, trials)
    return {
        "suspects": name,
        "trials": trials,
        "compared": compared,
        "false_accusations": events,
        "rate": events / trials,
        "low": low,
        "high": high,
        "seconds": round(seconds, 1),
    }


def show(console: rich.console.Console, result: sections.Result) -> None:
    title = f"Verdicts that accuse anybody innocent, alpha = {result['alpha']:g} (99.9 % Clopper-Pearson)"
    table = rich.table.Table(title=title, title_justify="left")
    for column in ("suspects", "rate", "interval", "trials", "compared", "verdict"):
        table.add_column(column, justify="left" if column in ("suspects", "verdict") else "right")
    for row in result["rows"]:
        broken, within = row["low"] > result["alpha"], row["high"] <= result["alpha"]
        table.add_row(
            row["suspects"],
            f"{row['rate']:.4f}",
            f"{row['low']:.3f} to {row['high']:.3f}",
            f"{row['trials']:,}",
            f"{row['compared']:,}",
            "[bold red]broken[/bold red]" if broken else "[green]within[/green]" if within else "not broken",
        )
    console.print(table)


def picture(path: Path, result: sections.Result) -> None:
    with sections.figure(path, 8, 1.4 + 0.3 * len(result["rows"])) as fig:
        axes = fig.subplots()
        for height, row in enumerate(result["rows"]):
            colour = "#000000" if row["suspects"].startswith("control") else "#2c6fa8"
            axes.plot([row["low"], row["high"]], [height] * 2, color=colour, lw=2)
            axes.plot(row["rate"], height, "o", color=colour, ms=5)
        axes.axvline(result["alpha"], color="0.2", lw=1, ls=":")
        axes.set_yticks(range(len(result["rows"])), [row["suspects"] for row in result["rows"]], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xlabel("verdicts that accuse anybody innocent (99.9 % interval); dotted: the promised bound")
        axes.set_title("False accusations at the desk; below: the negative control", loc="left")
