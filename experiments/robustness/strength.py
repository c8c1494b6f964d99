"""Which layers to mark, and how strongly: accuracy that copies lose, and what remains of T after a leaker's attack."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import rich.console
import rich.table

from experiments.common import networks, sections
from experiments.common.networks import ALPHA, CUSTOMERS
from smark_jax import attacks, carriers, codes, embedding, errors, extraction, models, statistics

LAYERS = {
    "all": None,
    "convolutions": "^Conv",
    "dense": "^Dense",
    "largest kernel": "^Dense_0/kernel",
    "all but the last": "^(?!Dense_1)",
    "last": "^Dense_1",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """``copies`` of each kind, of which the first is attacked; the ``networks`` are calibrated."""

    strengths: tuple[float, ...]
    layers: tuple[str, ...]
    copies: int
    attack_epochs: int
    epochs: int = 6
    num_chips: int = 304
    train_images: int | None = None
    networks: tuple[str, ...] = ("CNN", "ResNet-18", "concatenating")
    max_drop: float = 0.002


QUICK = Config(
    (0.003, 0.01, 0.03, 0.1), ("all", "convolutions", "dense"), copies=3, attack_epochs=1, epochs=3, networks=("CNN",)
)
FULL = Config((0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2), tuple(LAYERS), copies=10, attack_epochs=2)


def run(config: Config, seed: int, meter: sections.Meter) -> sections.Result:
    meter.start(networks.steps(config.epochs, config.train_images or 4000))
    train = lambda *_: meter.step("train the base")  # noqa: E731
    subject = networks.train(models.CNN(), seed, config.epochs, train, config.train_images)
    base, base_accuracy = subject.base, subject.accuracy(subject.base)
    tune = functools.partial(
        attacks.fine_tune,
        apply_fn=subject.apply_fn,
        images=subject.images,
        labels=subject.labels,
        epochs=config.attack_epochs,
        seed=seed,
    )
    suite = {
        "none": lambda copy: copy,
        "fine-tune": tune,
        "fine-tune, rate 0.003": functools.partial(tune, optimizer=optax.adam(3e-3)),
        "prune 90%": functools.partial(attacks.prune, fraction=0.9),
        "3 bits": functools.partial(attacks.quantise, bits=3),
        "L2 burst": functools.partial(tune, optimizer=optax.chain(optax.add_decayed_weights(0.01), optax.adam(1e-3))),
        "noise 0.5": functools.partial(attacks.add_noise, key=jax.random.key(seed), relative=0.5),
    }
    meter.start(len(config.layers) * len(config.strengths))
    rows = []
    for layers in config.layers:
        mark = carriers.mark(networks.secret(seed, "strength", layers), base, config.num_chips, match=LAYERS[layers])
        words = codes.codebook(networks.secret(seed, "strength", "code"), range(config.copies), config.num_chips)
        for strength in config.strengths:
            copies = [embedding.embed(base, mark, word, strength) for word in words]
            left = {}
            for name, attack in suite.items():
                suspect = attack(copies[0])
                chips = np.asarray(extraction.extract(suspect, base, mark, rectify=True), np.float64)
                statistic = float(chips @ np.asarray(words[0], np.float64) / np.linalg.norm(chips))
                left[name] = {"T": statistic, "accuracy": subject.accuracy(suspect)}
            drops = [base_accuracy - subject.accuracy(copy) for copy in copies]
            rows.append(
                {
                    "layers": layers,
                    "weights": mark.carrier.num_carrying,
                    "strength": strength,
                    "mean_drop": float(np.mean(drops)),
                    "worst_drop": float(np.max(drops)),
                    "attacks": left,
                }
            )
            meter.step(f"{layers}, strength {strength:g}")
    calibrations = [_calibrate(name, config, seed, meter) for name in config.networks]
    return {"accuracy": base_accuracy, "num_chips": config.num_chips, "rows": rows, "calibrations": calibrations}


def _calibrate(name: str, config: Config, seed: int, meter: sections.Meter) -> dict[str, Any]:
    """What each strength costs a network, scored on its training images, and the drop on test images at the choice."""
    meter.start(networks.steps(config.epochs, config.train_images or 4000))
    train = lambda *_: meter.step(f"train {name}")  # noqa: E731
    subject = networks.train(networks.networks()[name], seed, config.epochs, train, config.train_images)
    rows: dict[str, Any] = {"network": name, "accuracy": subject.accuracy(subject.base)}
    for kind, match in (("all", None), ("kernels", "kernel")):
        mark = carriers.mark(networks.secret(seed, "calibrate", name), subject.base, config.num_chips, match=match)

        try:
            found = networks.bearable(subject, mark, config.max_drop)
        except errors.TooCostly:
            rows[kind] = None
            continue
        words = codes.codebook(networks.secret(seed, "strength", "code"), range(config.copies), config.num_chips)
        copies = (embedding.embed(subject.base, mark, word, found.strength) for word in words)
        drops = [rows["accuracy"] - subject.accuracy(copy) for copy in copies]
        rows[kind] = {
            "strength": found.strength,
            "mean_drop": found.cost.drop,
            "worst_drop": found.worst.drop,
            "test_mean_drop": float(np.mean(drops)),
            "test_worst_drop": float(max(drops)),
        }
    return rows


def _bar(num_chips: int) -> float:
    """What T must reach to be accused among a million customers."""
    return statistics.threshold(np.ones(num_chips), float(np.log(ALPHA / CUSTOMERS)))


def show(console: rich.console.Console, result: sections.Result) -> None:
    suite = list(result["rows"][0]["attacks"])
    table = rich.table.Table(
        *("layers", "weights", "strength", "mean drop", "worst drop"),
        *(f"T, {name}" for name in suite),
        title=f"Strength and layers (base {result['accuracy']:.3f}); accused from T {_bar(result['num_chips']):.1f}",
        title_justify="left",
    )
    for row in result["rows"]:
        table.add_row(
            row["layers"],
            f"{row['weights']:,}",
            f"{row['strength']:g}",
            f"{row['mean_drop']:.4f}",
            f"{row['worst_drop']:.4f}",
            *(f"{row['attacks'][name]['T']:.1f}" for name in suite),
        )
    console.print(table)
    table = rich.table.Table(
        *("network", "accuracy", "weights marked", "strength", "mean drop", "worst drop", "on test images", "worst"),
        title="Strength that calibrate finds",
        title_justify="left",
    )
    for row in result["calibrations"]:
        for kind in ("all", "kernels"):
            found = row[kind]
            if found:
                drops = [found[name] for name in ("mean_drop", "worst_drop", "test_mean_drop", "test_worst_drop")]
                cells = [f"{found['strength']:g}", *(f"{drop:.4f}" for drop in drops)]
            else:
                cells = ["none"] + [""] * 4
            table.add_row(row["network"], f"{row['accuracy']:.3f}", kind, *cells)
    console.print(table)


def picture(path: Path, result: sections.Result) -> None:
    kinds = list(dict.fromkeys(row["layers"] for row in result["rows"]))
    with sections.figure(path, 8, 3.5) as figure:
        drop, left = figure.subplots(1, 2)
        for kind in kinds:
            rows = [row for row in result["rows"] if row["layers"] == kind]
            x = [row["strength"] for row in rows]
            drop.plot(x, [100 * row["mean_drop"] for row in rows], ".-", label=kind)
            left.plot(x, [min(a["T"] for a in row["attacks"].values()) for row in rows], ".-")
        left.axhline(_bar(result["num_chips"]), color="tab:red", lw=1)
        left.set_ylabel("smallest T after an attack")
        drop.set_ylabel("accuracy lost, points")
        drop.set_yscale("symlog", linthresh=0.1)
        for axes in (drop, left):
            axes.set_xscale("log")
            axes.set_xlabel("strength")
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
        figure.suptitle("What marking costs, and what the worst of the attacks leaves")
