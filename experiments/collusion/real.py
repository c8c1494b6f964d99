"""Real copies of a CNN trained on digits, with a million customers, and the pirate models of coalitions."""

import dataclasses
import time
from pathlib import Path

import jax
import numpy as np
import rich.console
import rich.table

from experiments.collusion import common
from experiments.common import sections
from smark_jax import attacks, carriers, codes, data, embedding, extraction, keys, models, tracing
from smark_jax._types import PyTree

ALPHA = 1e-6
LARGEST_DROP = 0.005
PRUNED = "average + 30 % pruning"


@dataclasses.dataclass(frozen=True)
class Case:
    """One code length, one coalition, and what it does."""

    num_chips: int
    colluders: int
    attacks: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Config:
    """``strengths`` are tried in order until no copy loses more than half a point of accuracy."""

    customers: int
    cases: tuple[Case, ...]
    strengths: tuple[float, ...] = (0.05, 0.04, 0.03, 0.02, 0.01)
    epochs: int = 6
    train_images: int | None = None


_ALL = ("average", "median", "minimum", "maximum", "min_max", "interleave", "extrapolate", PRUNED)
QUICK = Config(10**6, (Case(304, 10, ("average", "median", "extrapolate")),), epochs=4)
FULL = Config(10**6, (Case(304, 10, _ALL), Case(4096, 50, ("average", "median", "interleave"))))


def run(config: Config, seed: int, meter: sections.Meter) -> sections.Result:
    train, test = data.load("mnist_5k", "train"), data.load("mnist_5k", "test")
    images, labels = train.images[: config.train_images], train.labels[: config.train_images]
    network = models.CNN()
    apply_fn = models.apply_fn(network)

    def accuracy(params: PyTree) -> float:
        return models.accuracy(apply_fn, params, test.images, test.labels)

    steps = config.epochs * (len(labels) // 64)
    meter.start(steps + sum(case.colluders + len(case.attacks) for case in config.cases))
    start = models.init(network, jax.random.key(seed), images.shape[1:])
    step = lambda *_: meter.step("train base")  # noqa: E731
    base = attacks.fine_tune(start, apply_fn, images, labels, epochs=config.epochs, seed=seed, on_progress=step)
    base_accuracy = accuracy(base)
    cases = []
    for case in config.cases:
        key = keys.derive(common.master_key(seed, "real"), str(case.num_chips))
        mark = carriers.mark(keys.derive(key, "carrier"), base, case.num_chips)
        book = codes.Codebook(keys.derive(key, "code"), config.customers, case.num_chips)
        coalition = np.random.default_rng([seed, case.num_chips]).choice(
            config.customers, case.colluders, replace=False
        )
        words = codes.codebook(book.key, coalition, case.num_chips)
        copies, drops, strength = base, [float("nan")], 0.0
        for strength in config.strengths:
            copies = embedding.embed_batch(base, mark, words, strength)
            drops = [
                base_accuracy - accuracy(jax.tree.map(lambda leaf, k=k: leaf[k], copies)) for k in range(case.colluders)
            ]
            if max(drops) <= LARGEST_DROP + 1e-9:
                break
        meter.step(f"m={case.num_chips}: strength {strength:g}", case.colluders)
        rows = []
        for number, name in enumerate(case.attacks):
            pirate = _attack(name, copies, jax.random.key(seed + number))
            chips = np.asarray(extraction.extract(pirate, base, mark))
            rows.append({"attack": name, **_trace(chips, book, set(coalition.tolist())), "accuracy": accuracy(pirate)})
            meter.step(f"m={case.num_chips} {name}: {rows[-1]['caught']} of {case.colluders}")
        cases.append(
            {
                "num_chips": case.num_chips,
                "colluders": case.colluders,
                "strength": strength,
                "drop_mean": float(np.mean(drops)),
                "drop_worst": float(max(drops)),
                "drop_within": max(drops) <= LARGEST_DROP + 1e-9,
                "attacks": rows,
            }
        )
    return {
        "alpha": ALPHA,
        "customers": config.customers,
        "weights": carriers.select(base).num_weights,
        "base_accuracy": base_accuracy,
        "cases": cases,
    }


def _attack(name: str, copies: PyTree, key: jax.Array) -> PyTree:
    if name == PRUNED:
        return attacks.prune(attacks.average(copies), 0.3)
    return attacks.COLLUSIONS[name](copies, key)


def _trace(chips: np.ndarray, book: codes.Codebook, coalition: set[int]) -> sections.Result:
    began = time.perf_counter()
    verdict = tracing.trace(chips, book, ALPHA, keep_statistics=False)
    seconds = time.perf_counter() - began
    guilty, innocent = common.caught(verdict, coalition)
    own = [accusation for accusation in verdict.accused if accusation.serial in coalition]
    others = {
        f"caught_{decoder}": common.caught(tracing.trace(chips, book, ALPHA, decoder, keep_statistics=False), coalition)
        for decoder in ("sequential", "single")
    }
    return {
        "caught": guilty,
        "innocents": innocent,
        "weakest_statistic": min((abs(a.statistic) for a in own), default=None),
        "weakest_log10_p": max((a.log10_p for a in own), default=None),
        "decoy_alarm": verdict.decoys.alarm,
        "trace_seconds": round(seconds, 2),
        **{name: found[0] for name, found in others.items()},
        "innocents_other_decoders": sum(found[1] for found in others.values()),
    }


def show(console: rich.console.Console, result: sections.Result) -> None:
    console.print(
        f"CNN of {result['weights']:,} carrying weights, base accuracy {result['base_accuracy']:.3f}, "
        f"N = {result['customers']:,}, alpha = {result['alpha']:g}"
    )
    for case in result["cases"]:
        title = (
            f"m = {case['num_chips']}, K = {case['colluders']}, strength {case['strength']:g}: accuracy drop of a copy "
            f"{100 * case['drop_mean']:.2f} points in the mean, {100 * case['drop_worst']:.2f} at worst"
        )
        table = rich.table.Table(title=title, title_justify="left")
        for column in ("attack", "caught", "innocents", "weakest T", "log10 p", "pirate", "sequential", "single", "s"):
            table.add_column(column, justify="left" if column == "attack" else "right")
        for row in case["attacks"]:
            weakest, log10_p = row["weakest_statistic"], row["weakest_log10_p"]
            table.add_row(
                row["attack"],
                f"{row['caught']} of {case['colluders']}",
                str(row["innocents"]),
                "-" if weakest is None else f"{weakest:.1f}",
                "-" if log10_p is None else f"{log10_p:.1f}",
                f"{row['accuracy']:.3f}",
                str(row["caught_sequential"]),
                str(row["caught_single"]),
                f"{row['trace_seconds']:.1f}",
            )
        console.print(table)


def picture(path: Path, result: sections.Result) -> None:
    with sections.figure(path, 9, 1 + 1.0 * max(1, sum(len(case["attacks"]) for case in result["cases"])) * 0.6) as fig:
        ratios = [len(case["attacks"]) for case in result["cases"]]
        panels = np.atleast_1d(fig.subplots(len(ratios), 1, height_ratios=ratios))
        for axes, case in zip(panels, result["cases"], strict=True):
            rows, places = case["attacks"], np.arange(len(case["attacks"]))
            for shift, name, colour in (
                (-0.27, "caught", "#c0392b"),
                (0.0, "caught_sequential", "#d9a441"),
                (0.27, "caught_single", "#7f8c8d"),
            ):
                label = name.removeprefix("caught_").replace("caught", "joint")
                axes.barh(places + shift, [row[name] for row in rows], 0.25, color=colour, label=label)
            axes.set_yticks(places, [f"{row['attack']}\naccuracy {row['accuracy']:.3f}" for row in rows], fontsize=8)
            axes.invert_yaxis()
            axes.axvline(case["colluders"], color="0.3", lw=1, ls=":")
            axes.set_xlabel(f"colluders caught of {case['colluders']}")
            innocents = sum(row["innocents"] + row["innocents_other_decoders"] for row in rows)
            axes.set_title(
                f"MNIST CNN, m = {case['num_chips']:,}, N = {result['customers']:,}: {innocents} innocents accused",
                loc="left",
                fontsize=10,
            )
        panels[0].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
