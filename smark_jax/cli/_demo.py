"""``smark demo``: the whole workflow on real digits, from training across parties to naming who leaked.

This file is also an example of the public interface, from the first weights to the verdicts; start at :func:`run`.
Progress, the table and the plot are in ``_demo_show.py``.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from smark_jax import (
    aggregation,
    attacks,
    blackbox,
    carriers,
    codes,
    data,
    embedding,
    extraction,
    keys,
    models,
    parallel,
    tracing,
    training,
)
from smark_jax._types import ApplyFn, PyTree

NUM_CHIPS = 304
ALPHA = 1e-6
SHAPE_IMAGES, STRENGTH_IMAGES = 64, 256  # never the same
BATCH = 32  # examples per party and round
LEARNING_RATE = 2e-3
CLIP = 1.0  # bound on the norm of a party's gradient

Bar = Callable[[str], Callable[..., None]]
"""``bar(label)`` starts a progress bar and returns a function to call with steps done, total steps, and a loss."""


class Config(NamedTuple):
    """The demo's options."""

    out: Path
    parties: int
    customers: int
    epochs: int
    seed: int


class Digits(NamedTuple):
    """The network without its parameters, the training digits, and the accuracy of parameters on the test digits."""

    network: models.CNN
    apply_fn: ApplyFn
    train: data.Dataset
    accuracy: Callable[[PyTree], float]


class Model(NamedTuple):
    """What the owner keeps to issue and trace copies of a model."""

    key: keys.SecretKey
    base: PyTree
    mark: carriers.Mark
    codebook: jax.Array


class Suspect(NamedTuple):
    """A model that turned up: its description, whose copy it was (None: nobody's), its parameters and accuracy.

    If ``probes`` are given, the model is behind an API: the owner cannot see its parameters and asks it the probes.
    """

    name: str
    customer: int | None
    params: PyTree
    accuracy: float
    probes: np.ndarray | None = None


class Row(NamedTuple):
    """What ``results.json`` states about one suspect; T and the p-values are the customer's own, if that is accused."""

    suspect: str
    customer: int | None
    accuracy: float
    accused: tuple[int, ...]
    traced: bool
    statistic: float
    p_value: float
    log10_p: float
    threshold: float


class Results(NamedTuple):
    """The content of ``results.json``."""

    base_accuracy: float
    marked_accuracy_mean: float
    marked_accuracy_min: float
    bit_errors: int
    issued: int
    traced: int
    worst_p_value: float
    leaks_traced: int
    innocents_accused: int
    num_chips: int
    alpha: float
    parties: int
    epochs: int
    seed: int
    suspects: tuple[Row, ...]
    strength: float
    owner_mark_log10_p: float
    devices: tuple[str, ...]
    seconds: float = 0.0


class Found(NamedTuple):
    """The demo's outcome: the suspects, the verdict on each, and the results."""

    suspects: list[Suspect]
    verdicts: list[tracing.Verdict]
    results: Results


def run(config: Config, bar: Bar) -> Found:
    """Trains a base, issues copies, leaks some, and traces every suspect."""
    digits = load()
    # All secrets derive from the seed, so that the demo is reproducible. In production, use keys.new() as the master
    # key, and let each party draw its own secret and share nothing of it but aggregation.public_key.
    master = keys.derive(keys.from_bytes(config.seed.to_bytes(32, "big")), "demo")

    start = first_weights(digits, config.seed)
    owner = training.owner_mark(start, keys.derive(master, "owner"))
    base = train(config, digits, start, owner, master, bar(f"train base across {config.parties} parties"))

    model = own(base, digits, keys.derive(master, "mnist-cnn"), config.customers, bar("find how far weights may move"))
    issued = issue(model, digits, bar(f"issue {config.customers} copies"))
    leaks = leak(issued, digits, config.seed, bar)
    served = serve(issued, model, digits, config.seed, bar)

    label = "train an independent model"
    other_config = config._replace(seed=config.seed + 1, epochs=max(1, config.epochs // 2))
    other_start = first_weights(digits, other_config.seed)
    independent = train(other_config, digits, other_start, None, keys.derive(master, "other"), bar(label))
    other = Suspect("independent", None, independent, digits.accuracy(independent))

    suspects = [*issued, *leaks, served, other._replace(name="independent API", probes=served.probes), other]
    chips = read(model, suspects, digits)
    verdicts = trace(model, chips, bar("trace"))
    wrong_bits = int((np.sign(chips[: config.customers]) != model.codebook).sum())
    rows = tuple(row(suspect, verdict) for suspect, verdict in zip(suspects, verdicts, strict=True))
    proof = training.owner_log10_p(base, owner)
    return Found(suspects, verdicts, summary(config, digits.accuracy(base), model, rows, wrong_bits, proof))


def load() -> Digits:
    """Loads the embedded digits, and a network for them."""
    train, test = data.load("mnist_5k", "train"), data.load("mnist_5k", "test")
    network = models.CNN()
    apply_fn = models.apply_fn(network)
    accuracy = functools.partial(models.accuracy, apply_fn, images=test.images, labels=test.labels)
    return Digits(network, apply_fn, train, accuracy)


def first_weights(digits: Digits, seed: int) -> PyTree:
    """The initial weights of a training run."""
    return models.init(digits.network, jax.random.key(seed), digits.train.images.shape[1:])


def train(
    config: Config,
    digits: Digits,
    start: PyTree,
    owner: training.Owner | None,
    key: keys.SecretKey,
    on_progress: Callable[..., None],
) -> PyTree:
    """Trains across parties under masks; the owner's mark, if any, is added after aggregation."""
    batch = min(BATCH, len(digits.train.labels) // config.parties)
    recipe = training.Recipe(config.parties, config.epochs, batch, LEARNING_RATE, CLIP, config.seed)
    ready = training.prepare(recipe, digits.apply_fn, digits.train, owner)
    pair_keys = aggregation.pair_keys([keys.derive(key, "party", str(party)) for party in range(config.parties)])

    def on_round(state: parallel.TrainState, info: parallel.TrainInfo) -> None:
        on_progress(int(state.round), ready.rounds, info.loss)

    return training.fit(ready.step, ready.step.init(start), ready.batches(0), pair_keys, on_round).params


def own(base: PyTree, digits: Digits, key: keys.SecretKey, customers: int, on_progress: Callable[..., None]) -> Model:
    """Finds how far each weight may move so that copies answer as the base does, and draws carrier and codewords."""
    images = digits.train.images[: SHAPE_IMAGES + STRENGTH_IMAGES]
    shape = carriers.shape(base, digits.apply_fn, images[:SHAPE_IMAGES])
    on_progress(1, 2)
    mark = carriers.mark(keys.derive(key, "carrier"), base, NUM_CHIPS, shape=shape)
    found = embedding.calibrate(base, mark, digits.apply_fn, images[SHAPE_IMAGES:])
    on_progress(2, 2)
    codebook = codes.codebook(keys.derive(key, "code"), range(customers), NUM_CHIPS)
    return Model(key, base, mark._replace(strength=found.strength), codebook)


def issue(model: Model, digits: Digits, on_progress: Callable[..., None]) -> list[Suspect]:
    """Issues a copy to each customer."""
    copies = embedding.embed_batch(model.base, model.mark, model.codebook)
    issued = []
    for customer in range(len(model.codebook)):
        params = jax.tree.map(lambda leaf, row=customer: leaf[row], copies)
        issued.append(Suspect(f"copy {customer}", customer, params, digits.accuracy(params)))
        on_progress(customer + 1, len(model.codebook))
    return issued


def leak(issued: list[Suspect], digits: Digits, seed: int, bar: Bar) -> list[Suspect]:
    """Makes three customers leak: one fine-tunes first, one prunes, one quantises."""
    tuner, pruner, quantiser = (len(issued) * part // 20 for part in (7, 11, 13))
    images, labels = digits.train.images, digits.train.labels
    tuned = attacks.fine_tune(
        issued[tuner].params,
        digits.apply_fn,
        images,
        labels,
        epochs=3,
        seed=seed,
        on_progress=bar(f"customer {tuner} fine-tunes"),
    )
    attacked = [
        ("fine-tuned 3 epochs", tuner, tuned),
        ("pruned to 50 %", pruner, attacks.prune(issued[pruner].params, 0.5)),
        ("quantised to 4 bits", quantiser, attacks.quantise(issued[quantiser].params, 4)),
    ]
    return [Suspect(name, customer, params, digits.accuracy(params)) for name, customer, params in attacked]


def serve(issued: list[Suspect], model: Model, digits: Digits, seed: int, bar: Bar) -> Suspect:
    """Teaches one copy to answer probes and puts it behind an API, where nobody sees its weights."""
    customer, images = len(issued) * 17 // 20, np.asarray(digits.train.images)
    logits = jax.jit(digits.apply_fn)
    scores = lambda x: logits(model.base, x)  # noqa: E731
    probes = blackbox.probes(keys.derive(model.key, "probes"), NUM_CHIPS, images.shape[1:], images, scores)
    taught = blackbox.train_copies(
        jax.tree.map(lambda leaf: leaf[None], issued[customer].params),
        model.base,
        digits.apply_fn,
        images,
        probes,
        model.codebook[customer][None],
        digits.train.num_classes,
        epochs=3,
        seed=seed,
        on_progress=bar(f"teach copy {customer} to answer"),
    )
    params = jax.tree.map(lambda leaf: leaf[0], taught.params)
    return Suspect("API, labels only", customer, params, digits.accuracy(params), probes)


def read(model: Model, suspects: list[Suspect], digits: Digits) -> np.ndarray:
    """Reads each suspect's chips, shape [M, m], from its weights or from the labels of its API."""
    with_weights = aggregation.stack([suspect.params for suspect in suspects if suspect.probes is None])
    by_weights = iter(np.asarray(extraction.extract_batch(with_weights, model.base, model.mark)))
    return np.stack([next(by_weights) if s.probes is None else ask(s.params, s.probes, digits) for s in suspects])


def ask(params: PyTree, probes: np.ndarray, digits: Digits) -> np.ndarray:
    """Reads chips from the labels of the API behind which a copy runs."""
    answer = lambda images: np.asarray(digits.apply_fn(params, images).argmax(axis=-1))  # noqa: E731
    return blackbox.query(answer, probes, digits.train.num_classes)


def trace(model: Model, chips: np.ndarray, on_progress: Callable[..., None]) -> list[tracing.Verdict]:
    """The verdict on each suspect."""
    verdicts = []
    for row in chips:
        verdicts.append(tracing.trace(row, model.codebook, ALPHA))
        on_progress(len(verdicts), len(chips))
    return verdicts


def row(suspect: Suspect, verdict: tracing.Verdict) -> Row:
    """What the results state about a suspect."""
    accused = tuple(accusation.serial for accusation in verdict.accused)
    own = next((a for a in verdict.accused if a.serial == suspect.customer), None)
    return Row(
        suspect=suspect.name,
        customer=suspect.customer,
        accuracy=suspect.accuracy,
        accused=accused,
        traced=accused == (() if suspect.customer is None else (suspect.customer,)),
        statistic=own.statistic if own else float(verdict.statistics[np.abs(verdict.statistics).argmax()]),
        p_value=own.p_value if own else 1.0,
        log10_p=own.log10_p if own else 0.0,
        threshold=verdict.threshold,
    )


def summary(
    config: Config, base_accuracy: float, model: Model, rows: tuple[Row, ...], wrong_bits: int, owner_log10_p: float
) -> Results:
    """The results, from what is known of each suspect."""
    intact, others = rows[: config.customers], rows[config.customers :]
    accuracies = [row.accuracy for row in intact]
    return Results(
        base_accuracy=base_accuracy,
        marked_accuracy_mean=float(np.mean(accuracies)),
        marked_accuracy_min=min(accuracies),
        bit_errors=wrong_bits,
        issued=config.customers,
        traced=sum(row.traced for row in intact),
        worst_p_value=max(row.p_value for row in intact),
        leaks_traced=sum(row.traced for row in others if row.customer is not None),
        innocents_accused=sum(len(set(row.accused) - {row.customer}) for row in rows),
        num_chips=NUM_CHIPS,
        alpha=ALPHA,
        parties=config.parties,
        epochs=config.epochs,
        seed=config.seed,
        suspects=rows,
        strength=float(model.mark.strength),
        owner_mark_log10_p=owner_log10_p,
        devices=tuple(str(device) for device in parallel.devices(config.parties)),
    )
