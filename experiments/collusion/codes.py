"""Our code and others: traced share by coalition size, at equal strength per weight and under the same attacks.

Each code's words are embedded by its own carrier in the same base of normal weights; the copies are attacked weight by
weight, and noise is added. Longer words have weaker chips. BIBD determines its length and its number of customers, so
all codes use that number; orthogonal words need more chips than customers.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table

from experiments.collusion import common
from experiments.common import comparators, sections
from smark_jax import attacks, carriers, codes, embedding, extraction, keys, tracing

ALPHA = 1e-6
STYLES = {
    "ours, joint": ("#c0392b", "o-"),
    "ours, single": ("#e08e85", "o--"),
    "BIBD": ("#2c6fa8", "s-"),
    "Tardos": ("#3b8a5a", "^-"),
    "Nuida": ("#8e6bb0", "v-"),
    "orthogonal": ("#7f8c8d", "D-"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """``order`` is that of the projective plane, which has order^2 + order + 1 chips and customers."""

    sizes: tuple[int, ...]
    attacks: tuple[str, ...]
    trials: int
    order: int = 17
    weights: int = 1 << 17
    strength: float = 0.05
    noise: float = 0.1
    designed_for: int = 10


QUICK = Config(sizes=(1, 2, 5, 10, 15, 20), attacks=("average", "median", "min_max"), trials=2)
FULL = Config(
    sizes=(1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 18, 20, 24, 28),
    attacks=("average", "median", "minimum", "min_max", "interleave", "extrapolate"),
    trials=10,
)


def run(config: Config, seed: int, meter: sections.Meter) -> sections.Result:
    key = common.master_key(seed, "codes")
    others = _comparators(config, key)
    customers = len(others["BIBD"].words)
    m = others["BIBD"].words.shape[1]
    ours = np.asarray(codes.codebook(keys.derive(key, "code"), range(customers), m))
    words = {"ours": ours, **{name: code.words for name, code in others.items()}}
    base = {"kernel": jax.random.normal(jax.random.key(seed), (config.weights,))}
    mark_of = {
        length: carriers.mark(keys.derive(key, "carrier", str(length)), base, length)
        for length in sorted({book.shape[1] for book in words.values()})
    }
    meter.start(len(config.attacks) * len(config.sizes) * config.trials)
    rows = []
    for number, attack in enumerate(config.attacks):
        for size in config.sizes:
            found: dict[str, list[tuple[int, int]]] = {}
            for trial in range(config.trials):
                rng = np.random.default_rng([seed, number, size, trial])
                coalition = rng.choice(customers, size, replace=False)
                attack_key, noise_key = jax.random.split(jax.random.key(rng.integers(2**31)))
                for name, book in words.items():
                    mark = mark_of[book.shape[1]]
                    copies = embedding.embed_batch(base, mark, book[coalition], config.strength)
                    if size > 1:
                        pirate = attacks.COLLUSIONS[attack](copies, attack_key)
                    else:
                        pirate = jax.tree.map(lambda leaf: leaf[0], copies)
                    pirate = attacks.add_noise(pirate, noise_key, config.noise)
                    chips = np.asarray(extraction.extract(pirate, base, mark))
                    if name == "ours":
                        for decoder in ("joint", "single"):
                            verdict = tracing.trace(chips, book, ALPHA, decoder, keep_statistics=False)
                            count = common.caught(verdict, set(coalition.tolist()))
                            found.setdefault(f"ours, {decoder}", []).append(count)
                    else:
                        count = common.caught(others[name].trace(chips, ALPHA), set(coalition.tolist()))
                        found.setdefault(name, []).append(count)
                meter.step(f"{attack}, K = {size}")
            rows += [_row(attack, size, name, counts) for name, counts in found.items()]
    lengths = {name: words["ours" if name.startswith("ours") else name].shape[1] for name in STYLES}
    return {
        "alpha": ALPHA,
        "customers": customers,
        "num_chips": lengths,
        "chip_snr_db": {
            name: round(
                20 * float(np.log10(config.strength / config.noise)) + 10 * float(np.log10(config.weights / n)), 1
            )
            for name, n in lengths.items()
        },
        "rows": rows,
    }


def _row(attack: str, size: int, name: str, counts: list[tuple[int, int]]) -> dict[str, Any]:
    """What became of one code's coalitions: for each trial, how many guilty and how many innocent were accused."""
    guilty, innocent = np.array(counts).T
    return {
        "attack": attack,
        "colluders": size,
        "code": name,
        "caught_mean": float(guilty.mean()),
        "all_caught": float(np.mean(guilty == size)),
        "innocents_mean": float(innocent.mean()),
        "trials_with_innocents": float(np.mean(innocent > 0)),
    }


def _comparators(config: Config, key: keys.SecretKey) -> dict[str, comparators.Comparator]:
    bibd = comparators.bibd("projective", config.order, colluders=min(config.designed_for, config.order))
    customers, m = bibd.words.shape
    return {
        "BIBD": bibd,
        "Tardos": comparators.tardos(key, customers, m, config.designed_for),
        "Nuida": comparators.nuida(key, customers, m, config.designed_for),
        "orthogonal": comparators.orthogonal(customers),
    }


def show(console: rich.console.Console, result: sections.Result) -> None:
    lengths = ", ".join(f"{name} {m}" for name, m in result["num_chips"].items())
    console.print(f"N = {result['customers']:,} customers, equal strength per weight; chips: {lengths}")
    for attack in dict.fromkeys(row["attack"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["attack"] == attack]
        sizes = list(dict.fromkeys(row["colluders"] for row in rows))
        title = f"{attack}: colluders caught in the mean (innocents accused, where any)"
        table = rich.table.Table(title=title, title_justify="left")
        table.add_column("code")
        for size in sizes:
            table.add_column(f"K={size}", justify="right")
        for name in result["num_chips"]:
            line = [row for row in rows if row["code"] == name]
            table.add_row(name, *(_cell(row) for row in line))
        console.print(table)


def _cell(row: sections.Result) -> str:
    innocents = f" [bold red](+{row['innocents_mean']:.1f})[/bold red]" if row["innocents_mean"] else ""
    return f"{row['caught_mean']:.1f}{innocents}"


def picture(path: Path, result: sections.Result) -> None:
    names = list(dict.fromkeys(row["attack"] for row in result["rows"]))
    with sections.figure(path, 3.2 * max(2, len(names)) + 1, 6) as fig:
        panels = fig.subplots(2, len(names), sharex=True, sharey="row", squeeze=False, height_ratios=(2, 1))
        for (upper, lower), attack in zip(panels.T, names, strict=True):
            for code, (colour, style) in STYLES.items():
                rows = [row for row in result["rows"] if row["attack"] == attack and row["code"] == code]
                sizes = [row["colluders"] for row in rows]
                label = f"{code} (m = {result['num_chips'][code]})"
                upper.plot(sizes, [row["caught_mean"] for row in rows], style, color=colour, ms=4, label=label)
                lower.plot(sizes, [row["innocents_mean"] for row in rows], style, color=colour, ms=4)
            limits = [0, max(row["colluders"] for row in result["rows"])]
            upper.plot(limits, limits, color="0.6", lw=1, ls=":", zorder=0)
            upper.set_title(attack, loc="left", fontsize=10)
            lower.set_xlabel("coalition K")
        most = max(row["innocents_mean"] for row in result["rows"])
        panels[1, 0].set_ylim(-0.05 * max(1, most), 1.1 * max(1, most))
        panels[0, 0].set_ylabel("colluders caught (dotted: all)")
        panels[1, 0].set_ylabel("innocents accused")
        fig.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
        fig.suptitle(f"{result['customers']} customers, equal strength per weight, then noise", x=0.01, ha="left")
