"""Copies that each answer probes differently, traced by labels alone: after attacks, and what it costs."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

from experiments.blackbox import images as pictures
from experiments.common import networks, sections
from experiments.common.networks import ALPHA, CUSTOMERS, Subject
from smark_jax import attacks, blackbox, carriers, codes, embedding, extraction, keys, models, tracing
from smark_jax._types import ApplyFn, PyTree

_CLASSES = 10
_COALITIONS = (2, 3, 4, 5)


@dataclasses.dataclass(frozen=True)
class Config:
    """``copies`` are taught for ``teaching_epochs``; the first ``distilled`` are distilled as well."""

    copies: int
    epochs: int
    attack_epochs: int = 3
    teaching_epochs: int = 4
    probe_weight: float = 0.1
    distilled: int = 1
    distillation_epochs: int = 10
    timed: int = 4
    num_chips: int = 304
    train_images: int | None = None
    customers: int = CUSTOMERS


QUICK = Config(copies=2, epochs=5, distilled=0, timed=2)
FULL = Config(copies=20, epochs=15, distilled=3)


@dataclasses.dataclass(frozen=True)
class _Owner:
    """What the owner has: base, secrets, probes, and the customers to whom copies go."""

    subject: Subject
    mark: carriers.Mark
    book: codes.Codebook
    probes: np.ndarray
    serials: list[int]
    words: np.ndarray


def run(config: Config, seed: int, meter: sections.Meter) -> sections.Result:
    size = config.train_images or 4000
    meter.start(networks.steps(config.epochs, size))
    subject = networks.train(models.CNN(), seed, config.epochs, lambda *_: meter.step("the base"), config.train_images)
    owner = _owner(subject, config, seed)
    each = (config.teaching_epochs + config.attack_epochs) * (size // 64)
    tasks = config.copies * each + max(config.copies, 5) * config.teaching_epochs * (size // 64)
    meter.start(tasks + 2 * config.distilled * config.distillation_epochs * (size // 64))

    @functools.cache
    def taught(number: int) -> tuple[PyTree, float, float]:
        """The copy, its agreement, and the seconds that teaching took."""
        began = time.perf_counter()
        marked = embedding.embed_batch(subject.base, owner.mark, owner.words[number : number + 1])
        found = blackbox.train_copies(
            marked,
            subject.base,
            subject.apply_fn,
            subject.images,
            owner.probes,
            owner.words[number : number + 1],
            _CLASSES,
            epochs=config.teaching_epochs,
            probe_weight=config.probe_weight,
            seed=seed + number,
            on_progress=lambda *_: meter.step(f"teach copy {number}"),
        )
        seconds = time.perf_counter() - began
        return jax.tree.map(lambda x: x[0], found.params), float(found.agreement[0]), seconds

    copies = [
        meter.part(f"copy-{number}", each, functools.partial(_copy, owner, taught, number, config, seed, meter))
        for number in range(config.copies)
    ]
    averages = meter.part("averages", 0, functools.partial(_averages, owner, taught, config.copies))
    distilled = [
        meter.part(f"distilled-{number}", 0, functools.partial(_distilled, owner, taught, number, config, seed, meter))
        for number in range(config.distilled)
    ]
    meter.step("an independent model", 0)
    other = networks.train(models.CNN(), seed + 1, max(1, config.epochs // 2), train_images=config.train_images)
    innocents = {"the base": subject.base, "independent model": other.base}
    return {
        "base_accuracy": subject.accuracy(subject.base),
        "copies": copies,
        "averages": averages,
        "distilled": distilled,
        "innocent": [
            {"suspect": name, "accuracy": subject.accuracy(params), **_trace(owner, params)}
            for name, params in innocents.items()
        ],
        "stealth": _stealth(owner, seed),
        "cost": _cost(owner, config, seed),
        "customers": config.customers,
        "queries": len(owner.probes),
        "threshold": tracing.trace(np.ones(config.num_chips), owner.book, ALPHA, keep_statistics=False).threshold,
    }


@functools.partial(jax.jit, static_argnums=0)
def _logits(apply_fn: ApplyFn, params: PyTree, images: np.ndarray) -> jax.Array:
    return apply_fn(params, jnp.asarray(images))


def _owner(subject: Subject, config: Config, seed: int) -> _Owner:
    model = networks.secret(seed, "answers")
    mark = carriers.mark(keys.derive(model, "carrier"), subject.base, config.num_chips)
    book = codes.Codebook(keys.derive(model, "code"), config.customers, config.num_chips)
    scores = functools.partial(_logits, subject.apply_fn, subject.base)
    shape = subject.images.shape[1:]
    probes = blackbox.probes(keys.derive(model, "probes"), config.num_chips, shape, subject.images, scores)
    drawn = np.random.default_rng(seed).choice(config.customers, max(config.copies, max(_COALITIONS)), replace=False)
    words = np.asarray(codes.codebook(book.key, drawn, config.num_chips))
    return _Owner(subject, mark, book, probes, drawn.tolist(), words)


def _trace(
    owner: _Owner, params: PyTree, serials: tuple[int, ...] = (), at_the_api: Callable = lambda x: x
) -> dict[str, Any]:
    """Asks the suspect once about every probe, as it comes through the API, and traces the labels."""

    def predict(asked: np.ndarray) -> np.ndarray:
        return np.asarray(_logits(owner.subject.apply_fn, params, at_the_api(asked))).argmax(axis=-1)

    chips = blackbox.query(predict, owner.probes, _CLASSES)
    verdict = tracing.trace(chips, owner.book, ALPHA)
    accused = [accusation.serial for accusation in verdict.accused]
    own = verdict.statistics[list(serials)] if serials else np.abs(verdict.statistics).max(keepdims=True)
    return {
        "T": float(own.min()),
        "caught": len(set(accused) & set(serials)),
        "wrong": len(set(accused) - set(serials)),
        "log10_p": max((a.log10_p for a in verdict.accused), default=0.0),
    }


def _copy(owner: _Owner, taught: Callable, number: int, config: Config, seed: int, meter: sections.Meter) -> Any:
    """One copy: its accuracy, what was paid for it, and traces after each attack and way of asking."""
    copy, agreement, seconds = taught(number)
    subject, rng = owner.subject, np.random.default_rng(seed + number)
    tuned = attacks.fine_tune(
        copy,
        subject.apply_fn,
        subject.images,
        subject.labels,
        epochs=config.attack_epochs,
        seed=seed + 100 + number,
        on_progress=lambda *_: meter.step(f"fine-tune copy {number}"),
    )
    suspects: dict[str, tuple[PyTree, Callable]] = {
        "none": (copy, lambda x: x),
        f"fine-tuned {config.attack_epochs} epochs": (tuned, lambda x: x),
        "pruned 50 %": (attacks.prune(copy, 0.5), lambda x: x),
        "4 bits": (attacks.quantise(copy, 4), lambda x: x),
        "noise of 8 grey levels at the API": (copy, lambda x: pictures.noisy(x, 8, rng)),
        "JPEG 75 at the API": (copy, lambda x: pictures.through_file(x, "JPEG", quality=75)),
    }
    serial = owner.serials[number]
    rows = [
        {"attack": name, "accuracy": subject.accuracy(params), **_trace(owner, params, (serial,), api)}
        for name, (params, api) in suspects.items()
    ]
    chips = np.asarray(extraction.extract(copy, subject.base, owner.mark), np.float64)
    by_weights = float(chips @ owner.words[number].astype(np.float64) / np.linalg.norm(chips))
    return {"serial": serial, "agreement": agreement, "seconds": seconds, "weights_T": by_weights, "attacks": rows}


def _averages(owner: _Owner, taught: Callable, most: int) -> list[dict[str, Any]]:
    found = []
    for size in (size for size in _COALITIONS if size <= most):
        mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *(taught(k)[0] for k in range(size)))
        row = _trace(owner, mean, tuple(owner.serials[:size]))
        found.append({"colluders": size, "accuracy": owner.subject.accuracy(mean), **row})
    return found


def _distilled(
    owner: _Owner, taught: Callable, number: int, config: Config, seed: int, meter: sections.Meter
) -> list[dict[str, Any]]:
    """Students that saw only the copy's answers: to images, or to images and blends such as probes are."""
    copy, subject = taught(number)[0], owner.subject
    rng = np.random.default_rng(seed + number)
    pairs = rng.integers(0, len(subject.images), (2, len(subject.images)))
    blends = np.round(subject.images[pairs].mean(axis=0, dtype=np.float32)).astype(np.uint8)
    found = []
    for name, shown in {
        "images": subject.images,
        "images and blends": np.concatenate([subject.images, blends]),
    }.items():
        student = attacks.distil(
            copy,
            subject.apply_fn,
            shown,
            models.init(models.CNN(), jax.random.key(seed + 50 + number), subject.images.shape[1:]),
            epochs=max(1, config.distillation_epochs * len(subject.images) // len(shown)),
            seed=seed + number,
            on_progress=lambda *_: meter.step(f"distil copy {number}"),
        )
        row = _trace(owner, student, (owner.serials[number],))
        found.append({"shown": name, "accuracy": subject.accuracy(student), **row})
    return found


def _stealth(owner: _Owner, seed: int) -> list[dict[str, Any]]:
    """Area under the ROC of detectors that a wary API might run, probes against held-out images; 0.5 is invisible."""
    subject, shape = owner.subject, owner.subject.images.shape[1:]
    key = networks.secret(seed, "answers", "patterns")
    scores = functools.partial(_logits, subject.apply_fn, subject.base)
    patterns = blackbox.probes(key, len(owner.probes), shape, scores=scores)
    flat = subject.images.reshape(len(subject.images), -1).astype(np.float64)
    mean = flat.mean(axis=0)
    axes = np.linalg.svd(flat - mean, full_matrices=False)[2][:64]

    def residual(x: np.ndarray) -> np.ndarray:
        centred = x.reshape(len(x), -1) - mean
        return np.linalg.norm(centred - centred @ axes.T @ axes, axis=1)

    def unsure(x: np.ndarray) -> np.ndarray:
        return -np.asarray(jax.nn.softmax(scores(x)).max(axis=1))

    detectors = {"distance from 64 principal components": residual, "classifier's largest probability": unsure}
    return [
        {"probes": name, "detector": detector, "auc": _auc(score(subject.test_images), score(found))}
        for name, found in {"blends": owner.probes, "patterns": patterns}.items()
        for detector, score in detectors.items()
    ]


def _auc(clean: np.ndarray, odd: np.ndarray) -> float:
    return float(np.mean(odd[:, None] > clean) + 0.5 * np.mean(odd[:, None] == clean))


def _cost(owner: _Owner, config: Config, seed: int) -> dict[str, float]:
    """Seconds of one epoch of ordinary training, and of a teaching step of one copy: together under vmap, or alone."""
    subject, count = owner.subject, config.timed
    tune = functools.partial(
        attacks.fine_tune, subject.base, subject.apply_fn, subject.images, subject.labels, epochs=1, batch_size=64
    )
    tune()
    began = time.perf_counter()
    jax.block_until_ready(tune())
    epoch = time.perf_counter() - began
    words = np.resize(owner.words, (count, config.num_chips))
    copies = embedding.embed_batch(subject.base, owner.mark, words)
    found = {"epoch_seconds": epoch, "at_once": count}
    for name, at_once in (("alone", 1), ("together", count)):
        ticks: list[float] = []
        blackbox.train_copies(
            copies,
            subject.base,
            subject.apply_fn,
            subject.images[: 64 * 8],
            owner.probes,
            words,
            _CLASSES,
            epochs=1,
            at_once=at_once,
            seed=seed,
            on_progress=lambda *_, ticks=ticks: ticks.append(time.perf_counter()),
        )
        found[f"{name}_step_seconds"] = float(np.median(np.diff(ticks))) / at_once
    return found


def show(console: rich.console.Console, result: sections.Result) -> None:
    base, copies = result["base_accuracy"], result["copies"]
    accuracies = [copy["attacks"][0]["accuracy"] for copy in copies]
    console.print(
        f"Base {base:.3f}; {len(copies)} copies: mean {np.mean(accuracies):.4f}, worst {min(accuracies):.3f}; probes "
        f"answered as asked {np.mean([copy['agreement'] for copy in copies]):.1%}; read by weights T >= "
        f"{min(copy['weights_T'] for copy in copies):.1f}"
    )
    title = f"{result['queries']} labels, {result['customers']:,} customers, threshold {result['threshold']:.2f}"
    table = rich.table.Table(title=title, title_justify="left")
    for column in ("suspects", "accuracy", "lowest T", "largest p", "traced", "innocents accused"):
        table.add_column(column, justify="left" if column == "suspects" else "right")

    def add(name: str, rows: list[dict[str, Any]], of: int) -> None:
        exponent = max(row["log10_p"] for row in rows)
        table.add_row(
            name,
            f"{np.mean([row['accuracy'] for row in rows]):.3f}",
            f"{min(row['T'] for row in rows):.1f}",
            f"< 1e{math.floor(exponent) + 1}" if exponent < 0 else "-",
            f"{sum(row['caught'] for row in rows)} of {of}",
            str(sum(row["wrong"] for row in rows)),
        )

    for number, row in enumerate(copies[0]["attacks"]):
        add(row["attack"], [copy["attacks"][number] for copy in copies], len(copies))
    for row in result["averages"]:
        add(f"average of {row['colluders']}", [row], row["colluders"])
    for number in range(2 if result["distilled"] else 0):
        rows = [found[number] for found in result["distilled"]]
        add(f"distilled on {rows[0]['shown']}", rows, len(rows))
    for row in result["innocent"]:
        add(row["suspect"], [row], 0)
    console.print(table)
    for row in result["stealth"]:
        console.print(f"{row['probes']} seen by {row['detector']}: AUC {row['auc']:.2f}")
    cost, seconds = result["cost"], float(np.median([copy["seconds"] for copy in copies]))
    console.print(
        f"Teaching a copy: {seconds:.0f} s, {seconds / cost['epoch_seconds']:.1f} epochs of training; a step of a copy "
        f"{cost['alone_step_seconds']:.2f} s alone, {cost['together_step_seconds']:.2f} s when {cost['at_once']} "
        "are under vmap"
    )


def picture(path: Path, result: sections.Result) -> None:
    """T of every copy after each attack, with the threshold."""
    names = [row["attack"] for row in result["copies"][0]["attacks"]]
    with sections.figure(path, 8, 3.6) as figure:
        axes = figure.subplots()
        jitter = np.random.default_rng(0).uniform(-0.15, 0.15, len(result["copies"]))
        for height, _ in enumerate(names):
            found = [copy["attacks"][height]["T"] for copy in result["copies"]]
            axes.scatter(found, height + jitter, s=24, c="#2c7fb8", linewidths=0, label="" if height else "a copy")
        for offset, row in enumerate(result["innocent"]):
            axes.scatter([row["T"]], [len(names) + offset], s=30, c="0.5", label="" if offset else "largest |T| of all")
        axes.axvline(result["threshold"], c="#c0392b", lw=1.4, label="threshold")
        rows = [*names, *(row["suspect"] for row in result["innocent"])]
        axes.set_yticks(range(len(rows)), rows)
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel(f"statistic T from {result['queries']} labels, among {result['customers']:,} customers")
        axes.legend(frameon=False, fontsize=8)
