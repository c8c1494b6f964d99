"""Attacks that try to remove the fingerprint from one copy: accuracy kept, and whether it is still traced."""

import dataclasses
import functools
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import rich.console
import rich.table

from experiments.common import networks, sections
from experiments.common.networks import ALPHA, CUSTOMERS, Subject
from experiments.robustness import recipes
from smark_jax import carriers, codes, embedding, extraction, losses, models, parallel, tracing, training
from smark_jax._types import PyTree

_TOLERATED = 0.05  # a leaker who loses more accuracy has ruined the model


@dataclasses.dataclass(frozen=True)
class Config:
    """``max_drop`` is the accuracy that marking may cost; ``most_epochs`` caps every attack that trains."""

    chips: tuple[int, ...]
    embeddings: tuple[str, ...]
    most_epochs: int
    epochs: int = 6
    max_drop: float = 0.002
    train_images: int | None = None
    customers: int = CUSTOMERS
    only: tuple[str, ...] | None = None


QUICK = Config(chips=(304,), embeddings=("closed form",), most_epochs=1, epochs=3)
FULL = Config(chips=(304, 128, 1024), embeddings=("closed form", "trained"), most_epochs=10)


def run(config: Config, seed: int, meter: sections.Meter) -> sections.Result:
    meter.start(networks.steps(config.epochs, config.train_images or 4000))
    train = lambda *_: meter.step("train the base")  # noqa: E731
    subject = networks.train(models.CNN(), seed, config.epochs, train, config.train_images)
    fresh = models.init(models.CNN(), jax.random.key(seed + 2), subject.images.shape[1:])
    leaker = recipes.Leaker(subject, recipes.CNN, fresh, seed, config.most_epochs)
    rows, strengths = [], {}
    for number, num_chips in enumerate(config.chips):
        mark = carriers.mark(networks.secret(seed, "removal", "carrier"), subject.base, num_chips)
        strength = networks.bearable(subject, mark, config.max_drop).strength
        strengths[str(num_chips)] = strength
        chosen = [
            recipe for recipe in recipes.classic(leaker, strength) if not config.only or recipe.name in config.only
        ]
        if number == 0:
            meter.start(len(config.chips) * len(config.embeddings) * len(chosen))
        book = codes.Codebook(networks.secret(seed, "removal", "code"), config.customers, num_chips)
        customer = int(np.random.default_rng([seed, num_chips]).integers(config.customers))
        for method in config.embeddings:
            word = codes.codebook(book.key, [customer], num_chips)[0]
            if method == "trained":
                copy = _train_mark(subject, mark, word, strength, seed)
            else:
                copy = embedding.embed(subject.base, mark, word, strength)
            case = Case(subject, copy, mark, book, customer, method)
            name = f"{num_chips}_{method.replace(' ', '_')}"
            rows.extend(meter.part(name, len(chosen), functools.partial(_attack, case, chosen, meter)))
    return {"accuracy": subject.accuracy(subject.base), "strengths": strengths, "rows": rows}


class Case(NamedTuple):
    """One copy and all it takes to trace it."""

    subject: Subject
    copy: PyTree
    mark: carriers.Mark
    book: codes.Codebook
    leaker: int
    embedding: str


def _attack(case: Case, chosen: list[recipes.Recipe], meter: sections.Meter) -> list[dict[str, Any]]:
    rows = []
    for recipe in chosen:
        began = time.perf_counter()
        suspect = jax.block_until_ready(recipe.run(case.copy))
        row = {
            "attack": recipe.name,
            "setting": recipe.setting,
            "embedding": case.embedding,
            "chips": case.mark.num_chips,
            "extraction": recipe.extraction,
            "seconds": time.perf_counter() - began,
        }
        rows.append(row | _outcome(case, suspect))
        meter.step(f"m = {case.mark.num_chips}, {case.embedding}: {recipe.name} {recipe.setting}")
    return rows


def _outcome(case: Case, suspect: PyTree) -> dict[str, Any]:
    subject = case.subject
    if jax.tree.structure(suspect) != jax.tree.structure(subject.base):
        network = models.apply_fn(networks.ConcatNet())
        accuracy = models.accuracy(network, suspect, subject.test_images, subject.test_labels)
        unread = {"T": None, "T_plain": None, "p": 1.0, "traced": False, "traced_plain": False, "wrong": 0}
        return {"accuracy": accuracy, **unread}
    plain, chips = (
        np.asarray(extraction.extract(suspect, subject.base, case.mark, rectify), np.float64)
        for rectify in (False, True)
    )
    word = np.asarray(codes.codebook(case.book.key, [case.leaker], chips.size)[0], np.float64)
    accused, plainly = (tracing.trace(read, case.book, ALPHA).accused for read in (chips, plain))
    return {
        "accuracy": subject.accuracy(suspect),
        "T": float(chips @ word / np.linalg.norm(chips)),
        "T_plain": float(plain @ word / np.linalg.norm(plain)),
        "p": next((a.p_value for a in accused if a.serial == case.leaker), 1.0),
        "traced": case.leaker in [a.serial for a in accused],
        "traced_plain": case.leaker in [a.serial for a in plainly],
        "wrong": len({a.serial for a in (*accused, *plainly)} - {case.leaker}),
    }


def _train_mark(subject: Subject, mark: carriers.Mark, word: Any, strength: float, seed: int) -> PyTree:
    """One epoch on the task and on a hinge whose margin is the read-out of a closed-form copy of this strength."""
    margin = strength * math.sqrt(mark.carrier.num_carrying / mark.num_chips)
    hinge = functools.partial(losses.sign_hinge, margin=margin)
    optimizer = optax.chain(embedding.add_fingerprint_gradient(hinge, mark, word, weight=10.0), optax.adam(3e-4))
    loss = lambda params, x, y: parallel.cross_entropy(subject.apply_fn(params, x), y)  # noqa: E731
    batches = training.minibatches((subject.images, subject.labels), batch_size=64, epochs=1, seed=seed)
    return training.minimise(loss, optimizer, training.begin(subject.base, optimizer), batches)[0].params


def show(console: rich.console.Console, result: sections.Result) -> None:
    kinds = list(dict.fromkeys((row["chips"], row["embedding"]) for row in result["rows"]))
    table = rich.table.Table(
        "attack",
        "setting",
        *(f"m = {chips}, {method}" for chips, method in kinds),
        title=f"Accuracy kept (base: {result['accuracy']:.3f}) and T of the leaker (without rectifying); * not traced",
        title_justify="left",
    )
    by_row: dict[tuple[str, str], dict[tuple[int, str], str]] = {}
    for row in result["rows"]:
        statistic = "none" if row["T"] is None else f"{row['T']:.1f}"
        plain = "" if row["T"] is None else f" ({row['T_plain']:.1f})"
        cell = f"{row['accuracy']:.3f}  T {statistic}{plain}{'' if row['traced'] else ' *'}"
        by_row.setdefault((row["attack"], row["setting"]), {})[row["chips"], row["embedding"]] = cell
    for (attack, setting), cells in by_row.items():
        table.add_row(attack, setting, *(cells[kind] for kind in kinds))
    console.print(table)
    kept = [r for r in result["rows"] if r["accuracy"] >= result["accuracy"] - _TOLERATED and not r["extraction"]]
    for chips, method in kinds:
        rows = [r for r in kept if (r["chips"], r["embedding"]) == (chips, method)]
        weakest = min(rows, key=lambda r: r["T"])
        escaped = ", ".join(f"{r['attack']} {r['setting']}" for r in rows if not r["traced"])
        console.print(
            f"m = {chips}, {method}, strength {result['strengths'][str(chips)]:g}: {sum(r['traced'] for r in rows)} of "
            f"{len(rows)} attacks within 5 points of the base's accuracy are traced; weakest T {weakest['T']:.1f}, "
            f"p {weakest['p']:.0e} ({weakest['attack']} {weakest['setting']}); escaped: {escaped or 'none'}; "
            f"wrongly accused {sum(r['wrong'] for r in rows)}; without rectifying "
            f"{sum(r['traced_plain'] for r in rows)} traced"
        )


def picture(path: Path, result: sections.Result) -> None:
    kinds = list(dict.fromkeys((row["chips"], row["embedding"]) for row in result["rows"]))
    with sections.figure(path, 7.5, 4) as figure:
        axes = figure.subplots()
        for color, (chips, method) in enumerate(kinds):
            for extraction_, marker in ((False, "o"), (True, "x")):
                rows = [
                    (r["accuracy"], -math.log10(r["p"]))
                    for r in result["rows"]
                    if (r["chips"], r["embedding"], r["extraction"]) == (chips, method, extraction_)
                ]
                label = None if extraction_ else f"m = {chips}, {method}"
                x, y = zip(*rows, strict=True) if rows else ((), ())
                axes.plot(x, y, marker, color=f"C{color}", ms=4, alpha=0.7, label=label)
        axes.plot([], [], "x", color="gray", ms=4, label="distillation")
        axes.axhline(-math.log10(ALPHA), color="tab:red", lw=1, label="accused above")
        axes.axvspan(
            result["accuracy"] - _TOLERATED, 1, color="tab:green", alpha=0.08, lw=0, label="the model is of use"
        )
        axes.set_yscale("symlog", linthresh=6)
        axes.set_ylim(bottom=-0.5)  # a p-value of 1 is the lowest
        axes.set_xlabel("accuracy after the attack")
        axes.set_ylabel("-log10 of the p-value")
        axes.set_title("Each point one attack on one copy: accuracy kept against the trace")
        figure.legend(loc="outside right center", frameon=False, fontsize="small")
