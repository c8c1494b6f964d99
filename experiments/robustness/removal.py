"""Attacks that try to remove the fingerprint from one copy: accuracy kept, and whether it is still traced."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import rich.console
import rich.table

from experiments.common import networks, sections
from experiments.common.networks import ALPHA, CUSTOMERS, Subject
from smark_jax import _batches, attacks, carriers, codes, embedding, extraction, losses, models, parallel, tracing
from smark_jax._types import PyTree

_LAST = "Dense_1"
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


class Removal(NamedTuple):
    """An attack at one strength; ``extraction`` says that the outcome owes no weight to the copy."""

    name: str
    setting: str
    run: Callable[[PyTree], PyTree]
    extraction: bool = False


def removals(subject: Subject, seed: int, most_epochs: int, strength: float) -> list[Removal]:
    """Every attack; the leaker holds all training data, which is more than the usual suites grant.

    It is long because it is a list: an attack is one entry of ``found``.
    """
    key = jax.random.key(seed + 1)
    fresh = models.init(models.CNN(), jax.random.key(seed + 2), subject.images.shape[1:])
    other = networks.ConcatNet()
    other_fresh = models.init(other, jax.random.key(seed + 3), subject.images.shape[1:])
    apply_fn, images, labels = subject.apply_fn, subject.images, subject.labels
    own = lambda number: networks.secret(seed, "leaker", str(number))  # noqa: E731

    def tune(copy: PyTree, epochs: int, **settings: Any) -> PyTree:
        settings = {"labels": labels, "seed": seed + 1, **settings}
        return attacks.fine_tune(copy, apply_fn, images, epochs=min(epochs, most_epochs), **settings)

    def predicted(copy: PyTree) -> np.ndarray:
        return attacks.predicted_labels(copy, apply_fn, images)

    def cut_last(copy: PyTree) -> PyTree:
        return attacks.reinitialise(copy, fresh, _LAST)

    def guessed(copy: PyTree, guesses: int, weight: float) -> PyTree:
        drawn = [carriers.mark(own(number), subject.base) for number in range(guesses)]
        return tune(copy, 5, penalty=attacks.carrier_energy(copy, drawn, weight))

    def soup(copy: PyTree, part: float) -> PyTree:
        return jax.tree.map(lambda a, b: (1 - part) * a + part * b, copy, tune(copy, 5))

    def epochs(count: int) -> str:
        return f"{min(count, most_epochs)} epochs"

    quantised = lambda copy: attacks.quantise(copy, 4)  # noqa: E731
    found = [
        Removal("none", "", lambda copy: copy),
        Removal("fine-tune last layer", epochs(5), lambda c: tune(c, 5, trainable=_LAST)),
        Removal("fine-tune all layers", epochs(5), lambda c: tune(c, 5)),
        Removal("fine-tune all layers", f"{epochs(10)}, rate 0.003", lambda c: tune(c, 10, learning_rate=3e-3)),
        Removal("fine-tune, predicted labels", epochs(5), lambda c: tune(c, 5, labels=predicted(c))),
        Removal("retrain last layer", epochs(5), lambda c: tune(cut_last(c), 5, trainable=_LAST)),
        Removal("retrain all layers", epochs(10), lambda c: tune(cut_last(c), 10)),
        Removal("retrain, predicted labels", epochs(10), lambda c: tune(cut_last(c), 10, labels=predicted(c))),
        *(
            Removal("prune weights", f"{part:.0%}", functools.partial(attacks.prune, fraction=part))
            for part in (0.1, 0.3, 0.5, 0.7, 0.9, 0.95)
        ),
        *(
            Removal("prune filters", f"{part:.0%}", functools.partial(attacks.prune_filters, fraction=part))
            for part in (0.1, 0.25, 0.5)
        ),
        *(
            Removal(
                "fine-prune",
                f"{part:.0%} of filters, {epochs(10)}",
                lambda c, part=part: tune(attacks.prune_filters(c, part), 10, hold_zeros=True),
            )
            for part in (0.5, 0.9)
        ),
        Removal(
            "prune and fine-tune",
            f"95%, {epochs(5)}",
            lambda c: tune(attacks.prune(c, 0.95), 5, hold_zeros=True),
        ),
        *(
            Removal("quantise", f"{bits} bits", functools.partial(attacks.quantise, bits=bits))
            for bits in (8, 6, 5, 4, 3, 2)
        ),
        *(
            Removal("narrow type", dtype, functools.partial(attacks.cast, dtype=dtype))
            for dtype in ("float16", "bfloat16")
        ),
        *(
            Removal("noise", f"{part:g} rms", functools.partial(attacks.add_noise, key=key, relative=part))
            for part in (0.1, 0.3, 0.5, 1.0)
        ),
        *(
            Removal("low rank", f"{part:.0%}", functools.partial(attacks.low_rank, fraction=part))
            for part in (0.5, 0.25, 0.1)
        ),
        Removal("shift weights", f"{epochs(10)}", lambda c: tune(attacks.shift_weights(c, key), 10)),
        Removal("shift weights", f"third, {epochs(10)}", lambda c: tune(attacks.shift_weights(c, key, 0.5, 0.33), 10)),
        *(
            Removal("L2 burst", f"{l2:g}, {epochs(count)}", lambda c, l2=l2, count=count: tune(c, count, l2=l2))
            for l2, count in ((0.001, 5), (0.01, 1), (0.01, 5), (0.01, 10), (0.1, 5))
        ),
        Removal("label smoothing", f"0.3, {epochs(5)}", lambda c: tune(c, 5, label_smoothing=0.3)),
        *(
            Removal(
                "overwrite",
                f"{times} at {factor} x strength",
                functools.partial(attacks.overwrite, key=own(0), times=times, strength=factor * strength),
            )
            for times, factor in ((1, 1), (1, 3), (1, 5), (5, 5), (10, 5))
        ),
        Removal("soup with own fine-tune", f"half, {epochs(5)}", lambda c: soup(c, 0.5)),
        Removal("against guessed carriers", f"8 guesses, {epochs(5)}", lambda c: guessed(c, 8, 0.1)),
        Removal(
            "all at once",
            f"{epochs(5)}, prune 50%, 4 bits, noise 0.1",
            lambda c: quantised(attacks.add_noise(attacks.prune(tune(c, 5), 0.5), key, 0.1)),
        ),
    ]
    pass_on = functools.partial(attacks.distil, apply_fn=apply_fn, images=images, epochs=min(10, most_epochs))
    found += [
        Removal("distil", epochs(10), lambda c: pass_on(c, student=fresh), True),
        Removal(
            "distil",
            f"another network, {epochs(10)}",
            lambda c: pass_on(c, student=other_fresh, student_apply_fn=models.apply_fn(other)),
            True,
        ),
    ]
    return list({(removal.name, removal.setting): removal for removal in found}.values())  # capped epochs may coincide


def run(config: Config, seed: int, meter: sections.Meter) -> sections.Result:
    meter.start(networks.steps(config.epochs, config.train_images or 4000))
    train = lambda *_: meter.step("train the base")  # noqa: E731
    subject = networks.train(models.CNN(), seed, config.epochs, train, config.train_images)
    rows, strengths = [], {}
    for number, num_chips in enumerate(config.chips):
        mark = carriers.mark(networks.secret(seed, "removal", "carrier"), subject.base, num_chips)
        strength = networks.bearable(subject, mark, config.max_drop).strength
        strengths[str(num_chips)] = strength
        chosen = removals(subject, seed, config.most_epochs, strength)
        chosen = [removal for removal in chosen if not config.only or removal.name in config.only]
        if number == 0:
            meter.start(len(config.chips) * len(config.embeddings) * len(chosen))
        book = codes.Codebook(networks.secret(seed, "removal", "code"), config.customers, num_chips)
        leaker = int(np.random.default_rng([seed, num_chips]).integers(config.customers))
        for method in config.embeddings:
            word = codes.codebook(book.key, [leaker], num_chips)[0]
            if method == "trained":
                copy = _train_mark(subject, mark, word, strength, seed)
            else:
                copy = embedding.embed(subject.base, mark, word, strength)
            case = Case(subject, copy, mark, book, leaker, method)
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


def _attack(case: Case, chosen: list[Removal], meter: sections.Meter) -> list[dict[str, Any]]:
    rows = []
    for removal in chosen:
        began = time.perf_counter()
        suspect = jax.block_until_ready(removal.run(case.copy))
        row = {
            "attack": removal.name,
            "setting": removal.setting,
            "embedding": case.embedding,
            "chips": case.mark.num_chips,
            "extraction": removal.extraction,
            "seconds": time.perf_counter() - began,
        }
        rows.append(row | _outcome(case, suspect))
        meter.step(f"m = {case.mark.num_chips}, {case.embedding}: {removal.name} {removal.setting}")
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

    @jax.jit
    def step(params: PyTree, state: Any, x: Any, y: Any) -> tuple[PyTree, Any]:
        gradient = jax.grad(lambda p: parallel.cross_entropy(subject.apply_fn(p, x), y))(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params, state = subject.base, optimizer.init(subject.base)
    for index in _batches.shuffled(np.random.default_rng(seed), len(subject.images), 64):
        params, state = step(params, state, subject.images[index], subject.labels[index])
    return params


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
