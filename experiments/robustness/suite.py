"""The attack suite: every attack on copies with each kind of mark, judged by the desk's one pipeline.

A suspect is aligned to the base, and read once by ``extract``; who is accused of that reading counts. Other readings
are shown beside it and never chosen from. An attack's cost is the labelled images x epochs that it takes, relative to
those that the plain recipe needs from scratch to the same accuracy.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
import rich.console
import rich.table

from experiments.common import networks, pipeline, sections
from experiments.common.networks import CUSTOMERS, Subject
from experiments.robustness import rebuilding, recipes
from smark_jax import carriers, codes, embedding, extraction, models, parallel, training
from smark_jax._types import PyTree

TOLERATED = 0.05  # a leaker who loses more accuracy has ruined the model
CHEAP = 0.5  # of training from scratch
_OVERWRITING = 0.03  # strength of the leaker's own marks, which are white


class Target(NamedTuple):
    """A network, and the most epochs that an attack trains it for.

    Five epochs of ResNet-18 are more than half of what it takes from scratch: more tell nothing new, and take hours.
    """

    network: nn.Module
    parts: recipes.Parts
    most_epochs: int


TARGETS = {
    "CNN": Target(models.CNN(), recipes.CNN, 10),
    "ResNet-18": Target(models.ResNet18(width=16), recipes.RESNET, 5),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """``most_epochs`` caps every attack that trains, ``only`` names the attacks; ``copies`` are measured for harm.

    ``marks`` are ``"shaped"``, ``"white"`` or both beside each other.
    """

    networks: tuple[str, ...]
    most_epochs: int
    epochs: int = 6
    scratch_epochs: int = 10
    scratch_seeds: int = 3
    copies: int = 20
    marks: tuple[str, ...] = ("shaped",)
    num_chips: int = 304
    customers: int = CUSTOMERS
    train_images: int | None = None
    only: tuple[str, ...] | None = None


QUICK = Config(
    ("CNN",),
    most_epochs=2,
    scratch_seeds=1,
    only=(
        *("none", "noise", "prune weights", "quantise", "fine-tune all layers", "L2 burst", "project inputs"),
        *("project and fine-tune", "project, new head, noise, prune, 4 bits", "R0", "R1", "R2", "new head"),
        *("new dense layers", "progressive re-initialisation", "shrink and perturb", "merge", "swamp units"),
        *("fill unused inputs", "shift logits", "SAM", "AdamW", "train quantised", "factor and train"),
    ),
)
FULL = Config(("CNN", "ResNet-18"), most_epochs=10)


class Scratch(NamedTuple):
    """Training from scratch: labelled images x epochs, and the best accuracy so far, averaged over seeds."""

    passes: list[int]
    accuracy: list[float]

    def needed(self, accuracy: float) -> int:
        """The passes after which training from scratch is as accurate; the last ones where it never is."""
        return next(
            (n for n, reached in zip(self.passes, self.accuracy, strict=True) if reached >= accuracy), self.passes[-1]
        )


class Case(NamedTuple):
    """A leaked copy, and all that its owner needs to trace it."""

    subject: Subject
    copy: PyTree
    mark: carriers.Mark
    book: codes.Codebook
    customer: int


def run(config: Config, seed: int, meter: sections.Meter) -> sections.Result:
    return {"networks": [_network(name, config, seed, meter) for name in config.networks]}


def _network(name: str, config: Config, seed: int, meter: sections.Meter) -> dict[str, Any]:
    network, parts, most_epochs = TARGETS[name]
    count = config.train_images or 4000
    meter.start(networks.steps(config.epochs + config.scratch_seeds * config.scratch_epochs, count))
    subject = networks.train(network, seed, config.epochs, lambda *_: meter.step(f"train {name}"), config.train_images)
    scratch = Scratch(*meter.part(f"scratch_{name}", 0, lambda: _scratch(network, subject, config, seed, meter)))
    fresh = models.init(network, jax.random.key(seed + 2), subject.images.shape[1:])
    leaker = recipes.Leaker(subject, parts, fresh, seed, min(most_epochs, config.most_epochs))
    found = [
        *recipes.classic(leaker, _OVERWRITING),
        *rebuilding.projections(leaker),
        *rebuilding.restarts(leaker),
        *rebuilding.other_forms(leaker),
    ]
    chosen = [recipe for recipe in found if not config.only or recipe.name in config.only]
    meter.start(len(config.marks) * len(chosen))
    marks, rows = {}, []
    for kind in config.marks:
        case, marks[kind] = _marked(kind, subject, config, seed)
        for number, recipe in enumerate(chosen):
            attack = functools.partial(_attack, case, kind, leaker, recipe)
            rows.append(meter.part(f"{name}_{kind}_{number}", 0, attack))
            meter.step(f"{kind}: {recipe.name} {recipe.setting}")
    for row in rows:
        needed = scratch.needed(row["accuracy"])
        row |= {"cost": row["labelled"] / needed, "training": row["trained"] / needed}
    base = subject.accuracy(subject.base)
    return {"network": name, "accuracy": base, "scratch": scratch._asdict(), "marks": marks, "rows": rows}


def _scratch(
    network: nn.Module, subject: Subject, config: Config, seed: int, meter: sections.Meter
) -> tuple[list[int], list[float]]:
    """The recipe of the base on fresh weights, measured four times an epoch."""
    apply_fn, optimizer, batch = subject.apply_fn, optax.adam(1e-3), 64
    loss = lambda params, x, y: parallel.cross_entropy(apply_fn(params, x), y)  # noqa: E731
    steps = len(subject.images) // batch
    ends = [max(1, round(steps * quarter / 4)) for quarter in range(1, 4 * config.scratch_epochs + 1)]
    curves = []
    for number in range(config.scratch_seeds):
        start = models.init(network, jax.random.key(seed + 1000 + number), subject.images.shape[1:])
        state, curve = training.begin(start, optimizer), []
        data = (subject.images, subject.labels)
        batches = list(training.minibatches(data, batch_size=batch, epochs=config.scratch_epochs, seed=[seed, number]))
        for end in ends:
            state, _ = training.minimise(loss, optimizer, state, batches[state.steps : end])
            curve.append(subject.accuracy(state.params))
        meter.step("train from scratch", ends[-1])
        curves.append(np.maximum.accumulate(curve))
    return [end * batch for end in ends], [float(mean) for mean in np.mean(curves, axis=0)]


def _marked(kind: str, subject: Subject, config: Config, seed: int) -> tuple[Case, dict[str, Any]]:
    """The copy under attack, and what its mark does to a number of copies."""
    shape = networks.shape(subject) if kind == "shaped" else None
    mark = carriers.mark(networks.secret(seed, "suite", "carrier"), subject.base, config.num_chips, shape=shape)
    book = codes.Codebook(networks.secret(seed, "suite", "code"), config.customers, config.num_chips)
    customers = np.random.default_rng([seed, 1]).choice(config.customers, config.copies, replace=False)
    words = codes.codebook(book.key, customers, config.num_chips)
    copies = [embedding.embed(subject.base, mark, word) for word in words]
    drops = [subject.accuracy(subject.base) - subject.accuracy(copy) for copy in copies]
    read = (extraction.extract(copy, subject.base, mark) for copy in copies)
    intact = [pipeline.statistic(chips, word) for chips, word in zip(read, words, strict=True)]
    about = {"mean_drop": float(np.mean(drops)), "worst_drop": max(drops), "least_T": min(intact)}
    return Case(subject, copies[0], mark, book, int(customers[0])), about


def _attack(case: Case, kind: str, leaker: recipes.Leaker, recipe: recipes.Recipe) -> dict[str, Any]:
    leaker.reset()
    began = time.perf_counter()
    suspect = jax.block_until_ready(recipe.run(case.copy))
    about = {
        "mark": kind,
        "attack": recipe.name,
        "setting": recipe.setting,
        "extraction": recipe.extraction,
        "labelled": leaker.labelled,
        "trained": leaker.trained,
        "unlabelled": leaker.unlabelled,
        "seconds": time.perf_counter() - began,
    }
    return about | judge(case, suspect)


def judge(case: Case, suspect: PyTree) -> dict[str, Any]:
    """Accuracy of a suspect, the verdict of the one pipeline, and other readings' T of the leaker."""
    subject, mark = case.subject, case.mark
    if jax.tree.structure(suspect) != jax.tree.structure(subject.base):
        network = models.apply_fn(networks.ConcatNet())
        accuracy = models.accuracy(network, suspect, subject.test_images, subject.test_labels)
        return {"accuracy": accuracy, "refused": True, "T": None, "traced": False, "wrong": 0, "beside": {}}
    word = codes.codebook(case.book.key, [case.customer], mark.num_chips)[0]
    statistic = lambda params, read=extraction.extract, **how: pipeline.statistic(  # noqa: E731
        read(params, subject.base, mark, **how), word
    )
    judged = pipeline.judge(suspect, subject.base, subject.apply_fn, subject.test_images[:1], mark, case.book)
    beside = {"unaligned": statistic(suspect)}
    if mark.shape is None:
        beside["rectified"] = statistic(judged.aligned, rectify=True)
    else:
        beside["gains and biases"] = statistic(judged.aligned, extraction.extract_vectors)
    return {
        "accuracy": subject.accuracy(suspect),
        "refused": judged.refused,
        "T": judged.statistic(word),
        "traced": case.customer in judged.accused,
        "wrong": len(judged.accused - {case.customer}),
        "beside": beside,
    }


def place(row: dict[str, Any], base: float) -> str:
    """The table that a row belongs to."""
    if row["extraction"]:
        return "extraction"
    if row["accuracy"] < base - TOLERATED:
        return "ruined"
    return "costly" if row["cost"] > CHEAP else "cheap"


PLACES = {
    "cheap": "within 5 points of accuracy, at most half the labelled passes of training from scratch",
    "costly": "within 5 points, at more than half of training from scratch",
    "ruined": "more than 5 points lost",
    "extraction": "owing no weight to the copy",
}


def show(console: rich.console.Console, result: sections.Result) -> None:
    for found in result["networks"]:
        kinds = list(found["marks"])
        for kind, about in found["marks"].items():
            drops = f"{100 * about['mean_drop']:.2f} points in the mean, {100 * about['worst_drop']:.2f} at worst"
            console.print(
                f"{found['network']}, {kind} mark: base {found['accuracy']:.4f}, copies lose {drops}; "
                f"intact T {about['least_T']:.1f} or more"
            )
        for where, title in PLACES.items():
            rows = [row for row in found["rows"] if place(row, found["accuracy"]) == where]
            if rows:
                console.print(_table(f"{found['network']}: attacks {title}; * not traced", rows, kinds))
        for kind in kinds:
            rows = [row for row in found["rows"] if row["mark"] == kind]
            cheap = [row for row in rows if place(row, found["accuracy"]) == "cheap"]
            escaped = [f"{row['attack']} ({row['setting']})" for row in cheap if not row["traced"]]
            console.print(
                f"{found['network']}, {kind}: {len(cheap) - len(escaped)} of {len(cheap)} cheap attacks traced; "
                f"escaped: {', '.join(escaped) or 'none'}; false accusations: {sum(row['wrong'] for row in rows)}"
            )


def _table(title: str, rows: list[dict[str, Any]], kinds: list[str]) -> rich.table.Table:
    headings = ("accuracy", "cost", "training", "unlabelled", "T", "beside it")
    columns = [f"{kind}: {heading}" for kind in kinds for heading in headings]
    table = rich.table.Table("attack", "setting", *columns, title=title, title_justify="left")
    names = dict.fromkeys((row["attack"], row["setting"]) for row in rows)
    by_name = {(row["attack"], row["setting"], row["mark"]): row for row in rows}
    for attack, setting in names:
        cells = []
        for kind in kinds:
            row = by_name.get((attack, setting, kind))
            cells += _cells(row) if row else [""] * len(headings)
        table.add_row(attack, setting, *cells)
    return table


def _cells(row: dict[str, Any]) -> list[str]:
    statistic = "-" if row["T"] is None else f"{row['T']:.1f}"
    beside = ", ".join(f"{name} {value:.1f}" for name, value in row["beside"].items())
    return [
        f"{row['accuracy']:.3f}",
        f"{row['cost']:.2f}",
        f"{row['training']:.2f}",
        f"{row['unlabelled']:,}",
        statistic + ("" if row["traced"] else " *") + (" refused" if row["refused"] else ""),
        beside,
    ]


def picture(path: Path, result: sections.Result) -> None:
    colours = {"cheap": "tab:blue", "costly": "tab:orange", "ruined": "tab:gray", "extraction": "tab:green"}
    panels = [(found, kind) for found in result["networks"] for kind in found["marks"]]
    with sections.figure(path, 4 * len(panels), 3.6) as figure:
        for axes, (found, kind) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
            for where, colour in colours.items():
                rows = [row for row in found["rows"] if row["mark"] == kind and row["T"] is not None]
                rows = [row for row in rows if place(row, found["accuracy"]) == where]
                for traced, marker in ((True, "o"), (False, "x")):
                    some = [row for row in rows if row["traced"] == traced]
                    label = where if traced and axes is figure.axes[0] else None
                    accuracy, statistic = ([row[field] for row in some] for field in ("accuracy", "T"))
                    axes.plot(accuracy, statistic, marker, color=colour, ms=4, label=label)
            axes.axvline(found["accuracy"] - TOLERATED, color="black", lw=0.5)
            axes.set_title(f"{found['network']}, {kind} mark")
            axes.set_xlabel("accuracy kept")
        figure.axes[0].set_ylabel("T of the leaker (crosses: not traced)")
        figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize="small")
