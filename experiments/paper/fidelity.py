"""Cost and read-out of fingerprints by length and strength: copies in closed form, several base models."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import rich.console

from experiments.common import sections
from experiments.paper import common, report
from smark_jax import carriers, codes, embedding, extraction


@dataclasses.dataclass(frozen=True)
class Config:
    """``seeds`` base models are trained; of each, ``copies`` are made at every length and strength."""

    seeds: int
    lengths: tuple[int, ...]
    strengths: tuple[float, ...]
    epochs: int
    copies: int = 2
    customers: int = 1000
    train_images: int | None = None
    data: str = "mnist_5k"


QUICK = Config(2, (32, 304, 8192), (0.03, 0.1), epochs=2, copies=1)
FULL = Config(3, (32, 64, 128, 304, 1024, 4096, 8192), (0.01, 0.03, 0.1, 0.3), epochs=6)


def run(config: Config, seed: int, meter: sections.Meter) -> sections.Result:
    """Every seed is a part that survives an interruption."""
    cells = len(config.lengths) * len(config.strengths)
    each = common.steps(config.data, config.epochs, config.train_images) + cells
    meter.start(config.seeds * each)
    bases = [
        meter.part(f"base-{number}", each, lambda number=number: _base(config, seed, number, meter))
        for number in range(config.seeds)
    ]
    rows = []
    for cell in range(cells):
        found = [base["cells"][cell] for base in bases]
        copies = [copy for one in found for copy in one["copies"]]
        rows.append(
            {
                "chips": found[0]["chips"],
                "strength": found[0]["strength"],
                "accuracy": common.interval([one["accuracy"] for one in found]),
                "drop": common.interval(
                    [base["accuracy"] - one["accuracy"] for base, one in zip(bases, found, strict=True)]
                ),
                "bit_errors": sum(copy["bit_errors"] for copy in copies),
                "bits": len(copies) * found[0]["chips"],
                "worst_log10_p": max(copy["log10_p"] for copy in copies),
                "traced": sum(copy["traced"] for copy in copies),
                "innocents": sum(copy["innocents"] for copy in copies),
                "copies": len(copies),
            }
        )
    return {
        "base_accuracy": common.interval([base["accuracy"] for base in bases]),
        "weights": bases[0]["weights"],
        "customers": config.customers,
        "alpha": common.ALPHA,
        "data": config.data,
        "rows": rows,
        "bases": bases,
    }


def _base(config: Config, seed: int, number: int, meter: sections.Meter) -> dict[str, Any]:
    """One base model and its copies at every length and strength."""
    own = seed + 1000 * number
    subject = common.train(common.DATA[config.data].network, config, own, lambda *_: meter.step(f"base {number}"))
    base = subject.base
    cells = []
    for length in config.lengths:
        key = common.secret(own, "fidelity", str(length))
        mark = carriers.mark(key, base, length)
        book = codes.Codebook(key, config.customers, length)
        serials = np.random.default_rng([own, length]).choice(config.customers, config.copies, replace=False)
        words = np.asarray(codes.codebook(book.key, serials, length))
        for strength in config.strengths:
            accuracies, copies = [], []
            for serial, word in zip(serials.tolist(), words, strict=True):
                copy = embedding.embed(base, mark, word, strength)
                chips = np.asarray(extraction.extract(copy, base, mark), np.float64)
                accuracies.append(subject.accuracy(copy))
                copies.append(common.read(chips, book, serial, word)._asdict())
            cells.append(
                {"chips": length, "strength": strength, "accuracy": float(np.mean(accuracies)), "copies": copies}
            )
            meter.step(f"{length} chips at {strength:g}")
    return {
        "seed": own,
        "accuracy": subject.accuracy(base),
        "weights": carriers.select(base).num_weights,
        "cells": cells,
    }


def tables(result: sections.Result) -> list[report.Table]:
    base, rows = result["base_accuracy"], result["rows"]
    title = (
        f"Copies in closed form of a network of {result['weights']:,} carrying weights on {result['data']}: base "
        f"accuracy {common.show_interval(base, 2, 100)} %; 95 % t-intervals over n = {base['n']} base models; "
        f"N = {result['customers']:,} customers, alpha = {result['alpha']:g}"
    )
    columns = ("chips", "strength", "accuracy, %", "drop, points", "bit errors", "worst p", "traced", "innocents")
    return [
        report.Table(
            title,
            columns,
            [
                (
                    f"{row['chips']:,}",
                    f"{row['strength']:g}",
                    common.show_interval(row["accuracy"], 2, 100),
                    common.show_interval(row["drop"], 2, 100),
                    f"{row['bit_errors']:,} of {row['bits']:,}",
                    common.show_p(row["worst_log10_p"]),
                    f"{row['traced']} of {row['copies']}",
                    str(row["innocents"]),
                )
                for row in rows
            ],
            left=2,
        )
    ]


def show(console: rich.console.Console, result: sections.Result) -> None:
    report.show(console, tables(result))


def picture(path: Path, result: sections.Result) -> None:
    """Accuracy lost, and the worst p-value, against length, a line for each strength."""
    with sections.figure(path, 9, 3.6) as figure:
        lost, improbable = figure.subplots(1, 2)
        strengths = sorted({row["strength"] for row in result["rows"]})
        for colour, strength in zip(("#9ecae1", "#4292c6", "#08519c", "#c0392b"), strengths, strict=False):
            rows = [row for row in result["rows"] if row["strength"] == strength]
            lengths = [row["chips"] for row in rows]
            mean = [100 * row["drop"]["mean"] for row in rows]
            half = [100 * (row["drop"]["half"] or 0) for row in rows]
            lost.errorbar(lengths, mean, half, fmt="o-", ms=4, capsize=3, c=colour, label=f"strength {strength:g}")
            improbable.plot(lengths, [-row["worst_log10_p"] for row in rows], "o-", ms=4, c=colour)
        improbable.axhline(-np.log10(result["alpha"]), c="0.3", lw=1, ls=":")
        improbable.set_yscale("log")
        improbable.set_ylabel("worst copy: -log10 of the corrected p")
        lost.axhline(0, c="0.3", lw=1, ls=":")
        lost.set_ylabel("accuracy lost, points")
        for axes in (lost, improbable):
            axes.set_xscale("log", base=2)
            axes.set_xlabel("chips")
        lost.legend(frameon=False, fontsize=8)
