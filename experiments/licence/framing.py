"""Malicious owners against innocent customers, at a level that is high enough to be measured.

Each owner has one customer who never leaked, and takes it to court as often as the licence has parts. It succeeds if
any of these disputes convicts. The bound is alpha for each strategy (T4 in :mod:`smark_jax.licence.conviction`).

Controls must fail: the owner's own evidence, whose word the owner knows; a customer who opens the same part twice; an
owner whose spoiled packages are not counted; one who draws its keys after it has seen the word.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np
import rich.console
import rich.table

from experiments.common import intervals, sections
from experiments.licence import hostile, owners
from smark_jax.licence import conviction
from smark_jax.vault import evidence

_COUNTS = evidence.Counts(num_customers=10**6, num_suspects=1, num_alignments=1)
_OTHERS = 5


@dataclasses.dataclass(frozen=True)
class Config:
    """``owners`` are shared out among the strategies; ``grinders`` and ``spoilers`` run the whole protocol.

    The spoilers' licences have 256 choices in two parts, since each attempt takes a request and a package.
    """

    owners: int
    grinders: int
    tokens: int
    spoilers: int
    attempts: int = 1000
    alpha: float = 0.1
    num_segments: int = 4096
    num_parts: int = 8
    num_chips: int = 304


QUICK = Config(owners=200, grinders=2, tokens=20_000, spoilers=4)
FULL = Config(owners=2000, grinders=10, tokens=1_000_000, spoilers=60)


def run(config: Config, seed: int, meter: sections.Meter) -> sections.Result:
    names = [*owners.STRATEGIES, "spoils packages"]
    trials = max(1, config.owners // len(names))
    meter.start(trials * len(names) + config.grinders + config.spoilers + 4)
    rows = [
        meter.part(
            f"owners_{number}", trials, lambda number=number: _owners(names, number, trials, config, seed, meter)
        )
        for number in range(len(names))
    ]
    protocol = hostile.run(config, seed, meter)
    rows += [_row(one["name"], one["framed"], one["owners"]) for one in protocol["rows"]]
    controls = meter.part("controls", 4, lambda: _controls(config, seed, trials * len(names), meter))
    controls.append(_row("keys drawn after the word was seen", protocol["known"], config.grinders))
    return {
        "alpha": config.alpha,
        "disputes": config.num_parts,
        "rows": rows,
        "all": _row("all", sum(row["framed"] for row in rows), sum(row["owners"] for row in rows)),
        "controls": controls,
        "refused": protocol["refused"],
        "spoiled": protocol["spoiled"],
        "tokens": config.tokens,
    }


def _owners(
    names: list[str], number: int, trials: int, config: Config, seed: int, meter: sections.Meter
) -> sections.Result:
    """All owners of one strategy."""
    name, rng, framed = names[number], np.random.default_rng([seed, number]), 0
    for _ in range(trials):
        framed += _spoils(rng, config) if name not in owners.STRATEGIES else _frames(name, rng, config)
        meter.step(name)
    return _row(name, framed, trials)


def _row(name: str, framed: int, number: int) -> sections.Result:
    low, high = intervals.clopper_pearson(framed, number)
    return {"name": name, "owners": number, "framed": framed, "low": low, "high": high}


def _frames(name: str, rng: np.random.Generator, config: Config, *, again: bool = False) -> bool:
    """Whether any dispute of one owner convicts its innocent customer; ``again``: each part is opened twice."""
    chips = config.num_segments // config.num_parts
    word = rng.choice([-1, 1], (config.num_parts, chips)).astype(np.int8)
    others = rng.choice([-1, 1], (_OTHERS, config.num_parts, chips))
    enough = owners.enough(config.alpha, config.num_parts, 1)
    for part in range(config.num_parts):
        view = owners.View(rng, chips, list(word[: part + again]), others[:, part], enough)
        z = word[part].astype(float) if again else owners.STRATEGIES[name](view)
        if _convicts(z, word[part], 1, config):
            return True
    return False


def _convicts(z: np.ndarray, word: np.ndarray, attempt: int, config: Config) -> bool:
    found = conviction.test(z, word, config.num_parts, attempt, config.num_segments)
    return found.log10_p <= math.log10(config.alpha)


def _spoils(rng: np.random.Generator, config: Config) -> bool:
    """Whether an owner who spoils packages until a word survives, and then guesses in the other parts, succeeds."""
    chips = config.num_segments // config.num_parts
    found = owners.spoil(rng, chips, config.num_parts, config.alpha, config.attempts)
    if found.convicted:
        return True
    enough = owners.enough(config.alpha, config.num_parts, found.attempts)
    view = owners.View(rng, chips, [], np.empty((0, chips)), min(enough, chips))
    words = rng.choice([-1, 1], (config.num_parts, chips)).astype(np.int8)
    return any(_convicts(owners.few_segments(view), word, found.attempts, config) for word in words)


def _controls(config: Config, seed: int, number: int, meter: sections.Meter) -> list[sections.Result]:
    """The same numbers of owners where the word is known, where a part opens twice, and where attempts are free."""
    rng = np.random.default_rng([seed, 1000])
    known = 0
    for _ in range(number):
        word = rng.choice([-1, 1], config.num_chips)
        found = evidence.test(word + 0.3 * rng.normal(size=len(word)), word, (), _COUNTS)
        known += found.log10_p <= math.log10(config.alpha)
    meter.step("control: the owner's evidence")
    few = max(1, number // 8)
    twice = sum(_frames("", rng, config, again=True) for _ in range(few))
    meter.step("control: a part opened twice")
    chips, free = config.num_segments // config.num_parts, 0
    for _ in range(few):
        attempts = 10 * 2 ** owners.enough(config.alpha, config.num_parts, 1)
        free += owners.spoil(rng, chips, config.num_parts, config.alpha, attempts, counted=False).convicted
    meter.step("control: spoiled packages that are not counted", 2)
    return [
        _row("the owner's evidence alone, of which it knows the word", known, number),
        _row("a customer who opens a part twice", twice, few),
        _row("spoiled packages that are not counted", free, few),
    ]


def show(console: rich.console.Console, result: sections.Result) -> None:
    title = (
        f"Owners who frame an innocent customer in any of {result['disputes']} disputes, alpha = {result['alpha']:g}"
    )
    table = rich.table.Table(
        *("the owner", "owners", "framed", "99.9 % interval of the rate", "verdict"), title=title, title_justify="left"
    )
    for row in (*result["rows"], result["all"], *result["controls"]):
        broken, shown = row["low"] > result["alpha"], row["high"] <= result["alpha"]
        table.add_row(
            *(row["name"], f"{row['owners']:,}", f"{row['framed']:,}", f"{row['low']:.4f} to {row['high']:.4f}"),
            "[bold red]broken[/bold red]" if broken else "[green]within[/green]" if shown else "not broken",
        )
        if row is result["all"]:
            table.add_section()
    console.print(table)
    refused, spoiled = result["refused"], result["spoiled"]
    console.print(
        f"Refused of those who ran the whole protocol: {refused['replayed']} of {refused['tried']} old answers to a "
        f"new bundle, {refused['asked']} of {refused['tried']} challenges for a part that was opened before. "
        f"{spoiled['damaged']} of {spoiled['packages']} spoiled packages were refused as damaged."
    )


def picture(path: Path, result: sections.Result) -> None:
    rows = [*result["rows"], *result["controls"]]
    with sections.figure(path, 8, 1.4 + 0.26 * len(rows)) as fig:
        axes = fig.subplots()
        for height, row in enumerate(rows):
            colour = "#2c6fa8" if height < len(result["rows"]) else "#000000"
            axes.plot([row["low"], row["high"]], [height] * 2, color=colour, lw=2)
            axes.plot(row["framed"] / row["owners"], height, "o", color=colour, ms=5)
        axes.axvline(result["alpha"], color="0.2", lw=1, ls=":")
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel("share of owners who frame (99.9 % interval); dotted: bound; black: controls")
