"""Training across parties: masked, unmasked (a plain mean) and with differential privacy, on IID and non-IID data.

All three use the same split, number of rounds and optimiser. Copies of each trained model are then traced.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
from jax import Array

from experiments.common import networks, sections
from experiments.paper import common, report, splits
from smark_jax import (
    aggregation,
    attacks,
    carriers,
    codes,
    data,
    embedding,
    extraction,
    keys,
    models,
    parallel,
    privacy,
    training,
)

Params = Any
_KINDS = ("masked", "plain mean", "private")
_CLIP = 1.0


@dataclasses.dataclass(frozen=True)
class Config:
    """``batch`` counts the examples of all parties in a round; ``concentration`` is Dirichlet's."""

    parties: tuple[int, ...]
    seeds: int
    epochs: int
    copies: int = 5
    batch: int = 128
    learning_rate: float = 2e-3
    concentration: float = 0.5
    epsilon: float = 8.0
    delta: float = 1e-5
    num_chips: int = 304
    strength: float = 0.03
    customers: int = 1000
    points_an_epoch: int = 2
    train_images: int | None = None
    kinds: tuple[str, ...] = _KINDS
    data: str = "mnist_5k"


QUICK = Config((2,), seeds=1, epochs=2, copies=2, points_an_epoch=1)
FULL = Config((2, 8), seeds=3, epochs=4)


class _Task(NamedTuple):
    """One training to be done."""

    parties: int
    split: str
    kind: str
    seed: int


def run(config: Config, seed: int, meter: sections.Meter) -> sections.Result:
    """Every training is a part that survives an interruption."""
    train, test = networks.loaded(config.data)
    train = train._replace(images=train.images[: config.train_images], labels=train.labels[: config.train_images])
    tasks = [
        _Task(parties, split, kind, seed + 1000 * number)
        for parties in config.parties
        for kind in config.kinds
        for number in range(config.seeds)
        for split in ("IID", f"Dirichlet({config.concentration:g})")
    ]
    ways = {parties: _Way(parties, config, train) for parties in config.parties}
    meter.start(sum(ways[task.parties].rounds for task in tasks))
    found = []
    for task in tasks:
        name = f"{task.parties}-{task.split}-{task.kind}-{task.seed}".replace(" ", "_")
        way = ways[task.parties]
        compute = functools.partial(_train_and_trace, task, way, config, train, test, meter)
        found.append({**task._asdict(), **meter.part(name, way.rounds, compute)})
    return {
        "data": config.data,
        "epsilon": config.epsilon,
        "delta": config.delta,
        "customers": config.customers,
        "alpha": common.ALPHA,
        "runs": found,
    }


class _Way:
    """The rounds' steps for a number of parties, each compiled once for all seeds and splits."""

    def __init__(self, parties: int, config: Config, train: data.Dataset) -> None:
        self.network = common.DATA[config.data].for_parties
        self.apply_fn = models.apply_fn(self.network)
        self.parties, self.batch, self.image_shape = parties, config.batch // parties, train.images.shape[1:]
        examples = len(train.labels) // parties
        self.rounds = training.num_batches(examples, self.batch, config.epochs)
        self.optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, self.rounds))
        self.sampling = privacy.Sampling(parties, examples, self.batch / examples, self.rounds)
        self._plan = functools.partial(privacy.plan, self.sampling, config.epsilon, config.delta)

    def start(self, seed: int) -> Params:
        return models.init(self.network, jax.random.key(seed), self.image_shape)

    @functools.cached_property
    def guarantee(self) -> privacy.Guarantee:
        return self._plan()

    def private_optimizer(self, seed: int) -> optax.GradientTransformation:
        noise = privacy.gaussian_noise(self.guarantee, _CLIP, self.start(seed), common.secret(seed, "noise"))
        return optax.chain(noise, self.optimizer)

    @functools.cached_property
    def masked(self) -> parallel.TrainStep:
        return parallel.train_step(self.apply_fn, self.optimizer, aggregation.FixedPoint(_CLIP, self.parties))

    @functools.cached_property
    def private(self) -> parallel.TrainStep:
        return parallel.train_step(
            self.apply_fn,
            self.private_optimizer(0),  # its state holds the key, which differs for each seed
            privacy.fixed_point(self.sampling, _CLIP),
            value_and_grad=privacy.value_and_clipped_grad(self.sampling, _CLIP),
        )

    @functools.cached_property
    def plain(self) -> Callable[[Params, Any, Array, Array], tuple[Params, Any]]:
        """What masks must not change: the mean of the parties' clipped gradients, in floats and in the open."""

        @jax.jit
        def update(params: Params, state: Any, images: Array, labels: Array) -> tuple[Params, Any]:
            def of_party(x: Array, y: Array) -> Params:
                gradient = jax.grad(lambda p: parallel.cross_entropy(self.apply_fn(p, x), y))(params)
                scale = jnp.minimum(1.0, _CLIP / jnp.maximum(optax.tree.norm(gradient), 1e-30))
                return jax.tree.map(lambda leaf: leaf * scale, gradient)

            each = [of_party(*batch) for batch in zip(images, labels, strict=True)]
            mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *each)
            updates, state = self.optimizer.update(mean, state, params)
            return optax.apply_updates(params, updates), state

        return update


def _train_and_trace(
    task: _Task, way: _Way, config: Config, train: data.Dataset, test: data.Dataset, meter: sections.Meter
) -> dict[str, Any]:
    if task.split == "IID":
        images, labels = training.partition(train.images, train.labels, task.parties, task.seed)
    else:
        images, labels = splits.dirichlet(train.images, train.labels, task.parties, config.concentration, task.seed)
    every = max(1, way.rounds // (config.epochs * config.points_an_epoch))
    curve: list[list[float]] = []

    def score(params: Params) -> float:
        return models.accuracy(way.apply_fn, params, test.images, test.labels)

    def on_round(params: Params, done: int) -> None:
        meter.step(f"{task.parties} parties, {task.split}, {task.kind}")
        if done % every == 0 or done == way.rounds:
            curve.append([done, score(params)])

    params = _train(task, way, images, labels, config.epochs, on_round)
    return {
        "imbalance": splits.imbalance(labels),
        "curve": curve,
        "accuracy": curve[-1][1],
        **_trace(params, config, task.seed, score),
    }


def _train(
    task: _Task, way: _Way, images: np.ndarray, labels: np.ndarray, epochs: int, on_round: Callable[[Params, int], None]
) -> Params:
    """The parameters after all rounds; ``on_round(params, rounds done)`` is called after each."""
    params = way.start(task.seed)
    batches = training.batches(images, labels, way.batch, epochs, task.seed + 1)
    if task.kind == "plain mean":
        state = way.optimizer.init(params)
        for number, batch in enumerate(batches):
            params, state = way.plain(params, state, *map(jnp.asarray, batch))
            on_round(params, number + 1)
        return params
    secrets = [common.secret(task.seed, "party", str(party)) for party in range(task.parties)]
    if task.kind == "masked":
        step, state = way.masked, way.masked.init(params)
    else:
        step, state = way.private, way.private.init(params)
        state = state._replace(opt_state=way.private_optimizer(task.seed).init(state.params))
        batches = privacy.batches(way.sampling, images, labels, secrets)

    def watch(state: parallel.TrainState, info: parallel.TrainInfo) -> None:
        on_round(state.params, int(state.round))

    return training.fit(step, state, batches, aggregation.pair_keys(secrets), watch).params


def _trace(base: Params, config: Config, seed: int, score: Callable[[Params], float]) -> dict[str, Any]:
    """Copies of the trained model, intact and pruned, traced among all customers."""
    key = common.secret(seed, "parties")
    mark = carriers.mark(keys.derive(key, "carrier"), base, config.num_chips)
    book = codes.Codebook(keys.derive(key, "code"), config.customers, config.num_chips)
    serials = np.random.default_rng(seed).choice(config.customers, config.copies, replace=False)
    words = np.asarray(codes.codebook(book.key, serials, config.num_chips))
    readings: dict[str, list[common.Reading]] = {"intact": [], "pruned": []}
    accuracies = []
    for serial, word in zip(serials.tolist(), words, strict=True):
        copy = embedding.embed(base, mark, word, config.strength)
        accuracies.append(score(copy))
        for name, suspect in (("intact", copy), ("pruned", attacks.prune(copy, 0.5))):
            chips = np.asarray(extraction.extract(suspect, base, mark), np.float64)
            readings[name].append(common.read(chips, book, serial, word))
    return {
        "copies": config.copies,
        "accuracy_of_copies": float(np.mean(accuracies)),
        "bit_errors": sum(reading.bit_errors for reading in readings["intact"]),
        "worst_log10_p": max(reading.log10_p for reading in readings["intact"]),
        "traced": sum(reading.traced for reading in readings["intact"]),
        "traced_pruned": sum(reading.traced for reading in readings["pruned"]),
        "innocents": sum(reading.innocents for found in readings.values() for reading in found),
    }


def _groups(result: sections.Result) -> dict[tuple[int, str, str], list[dict[str, Any]]]:
    groups: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
    for found in result["runs"]:
        groups.setdefault((found["parties"], found["split"], found["kind"]), []).append(found)
    return dict(sorted(groups.items(), key=lambda item: (item[0][0], item[0][1] != "IID", _KINDS.index(item[0][2]))))


def tables(result: sections.Result) -> list[report.Table]:
    rows = []
    for (parties, split, kind), runs in _groups(result).items():
        copies = sum(found["copies"] for found in runs)
        rows.append(
            (
                str(parties),
                split,
                f"private, epsilon {result['epsilon']:g}" if kind == "private" else kind,
                f"{np.mean([found['imbalance'] for found in runs]):.2f}",
                common.show_interval(common.interval([found["accuracy"] for found in runs]), 2, 100),
                common.show_interval(common.interval([found["accuracy_of_copies"] for found in runs]), 2, 100),
                str(sum(found["bit_errors"] for found in runs)),
                common.show_p(max(found["worst_log10_p"] for found in runs)),
                f"{sum(found['traced'] for found in runs)} of {copies}",
                f"{sum(found['traced_pruned'] for found in runs)} of {copies}",
                str(sum(found["innocents"] for found in runs)),
            )
        )
    seeds = max(len(runs) for runs in _groups(result).values())
    title = (
        f"Training across parties ({result['data']}), and copies of what it gives: 95 % t-intervals over n = {seeds} "
        f"seeds; delta {result['delta']:g}; N = {result['customers']:,}, alpha = {result['alpha']:g}"
    )
    columns = (
        "parties",
        "data",
        "sum",
        "imbalance",
        "accuracy, %",
        "copies, %",
        "bit errors",
        "worst p",
        "traced",
        "pruned 50 %",
        "innocents",
    )
    return [report.Table(title, columns, rows, left=3)]


def show(console: rich.console.Console, result: sections.Result) -> None:
    report.show(console, tables(result))


def picture(path: Path, result: sections.Result) -> None:
    """Accuracy per round; each seed a thin line, their mean a thick one."""
    groups = _groups(result)
    counts, names = (
        sorted({key[0] for key in groups}),
        sorted({key[1] for key in groups}, key=lambda name: name != "IID"),
    )
    with sections.figure(path, 3.1 * len(counts) + 1, 5.2) as figure:
        grid = figure.subplots(len(names), len(counts), squeeze=False, sharey=True)
        styles = {"masked": ("#c0392b", "-"), "plain mean": ("0.2", ":"), "private": ("#2c7fb8", "-")}
        for (parties, split, kind), runs in groups.items():
            axes = grid[names.index(split)][counts.index(parties)]
            curves, (colour, line) = np.array([found["curve"] for found in runs]), styles[kind]
            for curve in curves:
                axes.plot(curve[:, 0], 100 * curve[:, 1], c=colour, lw=0.6, alpha=0.5, ls=line)
            mean = 100 * curves[:, :, 1].mean(axis=0)
            axes.plot(curves[0, :, 0], mean, c=colour, lw=1.8, ls=line, label=kind)
            axes.set_title(f"{parties} parties, {split}", loc="left", fontsize=9)
            axes.set_xlabel("round")
            axes.grid(alpha=0.3)
        for row in grid:
            row[0].set_ylabel("accuracy, %")
        grid[0][0].legend(frameon=False, fontsize=8)
