"""The zoo's architectures: copies under a random member of all rewrites that leave the function alone, and damage.

Each suspect is aligned to the base, read once, and traced. For networks of the same form that are no copies nobody must
be accused, and suspects of other forms must get an answer that says why.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common import networks, pipeline, sections, zoo
from experiments.common.networks import ALPHA, CUSTOMERS, Subject
from experiments.robustness.architecture_tables import picture, show
from smark_jax import (
    _compiling,
    _trees,
    alignment,
    attacks,
    carriers,
    codes,
    embedding,
    errors,
    extraction,
    statistics,
    tracing,
)
from smark_jax._types import PyTree

__all__ = ["FULL", "QUICK", "Config", "picture", "run", "show"]

INNOCENTS = 1000
_IMAGES = 64
_TUNING = optax.adam(3e-4)  # random bases need a smaller step than the original network

_SPELLINGS = ("ViT, mean", "ViT, nnx", "ConvNeXt, nnx")  # of networks that are there already

_NOTHING: dict[str, Any] = {
    **{"similarity": 0.0, "T": 0.0, "traced": False, "accused": 0, "wrong": 0},
    **{"innocent_mean": 0.0, "innocent_largest": 0.0},
}
"""The trace of a suspect in which alignment found no weights to read."""

Damage = Callable[[PyTree, Subject, jax.Array], PyTree]
DAMAGES: dict[str, Damage] = {
    "10 % noise": lambda copy, _, key: attacks.add_noise(copy, key, 0.1, match="kernel"),
    "50 % pruned": lambda copy, *_: attacks.prune(copy, 0.5),
    "int8": lambda copy, *_: attacks.quantise(copy, 8),
    "tuned": lambda copy, subject, _: attacks.fine_tune(
        copy, networks.quick_gradients(subject.apply_fn), subject.images, subject.labels, epochs=2, optimizer=_TUNING
    ),
}
ORDERS = ("damage first", "rewrite first")


@dataclasses.dataclass(frozen=True)
class Config:
    """``independents`` are networks of the same form trained from other seeds; ``untrained`` have initial weights.

    ``damages`` are names in :data:`DAMAGES`. Transformers learn more slowly than convolutional networks, and have
    epochs of their own.
    """

    compositions: int
    independents: int
    untrained: int
    networks: tuple[str, ...] = tuple(name for name in zoo.networks() if name not in _SPELLINGS)
    epochs: int = 4
    transformer_epochs: int = 10
    train_images: int | None = None
    customers: int = CUSTOMERS
    num_chips: int = 304
    max_change: float = embedding.MAX_CHANGE
    damages: tuple[str, ...] = tuple(DAMAGES)


QUICK = Config(2, 1, 1, ("ViT", "MobileNetV3"), 2, 2, train_images=960, damages=("50 % pruned",))
FULL = Config(50, 1, 19)


class Owner(NamedTuple):
    """A base and all that its owner needs to trace a copy of it.

    Attributes:
      subject: the trained network.
      mark: its mark.
      book: the customers' codewords.
      leaker: serial of the customer whose copy leaked.
      word: the leaker's codeword, shape [m].
      others: codewords of a thousand innocents, shape [1000, m].
    """

    subject: Subject
    mark: carriers.Mark
    book: codes.Codebook
    leaker: int
    word: np.ndarray
    others: np.ndarray


def run(config: Config, seed: int, meter: sections.Meter) -> sections.Result:
    suspects = (
        config.compositions + config.independents + config.untrained + len(ORDERS) * len(config.damages) + len(FORMS)
    )
    epochs = {name: (1 + config.independents) * _epochs(name, config) for name in config.networks}
    steps = {name: suspects + networks.steps(epochs[name], config.train_images or 4000) for name in config.networks}
    meter.start(sum(steps.values()))
    rows = []
    for name in config.networks:
        row = functools.partial(_network, name, config, seed, meter)
        rows.append(meter.part(name, steps[name], row))
    bar = statistics.threshold(np.ones(config.num_chips), math.log(ALPHA / config.customers))
    return {"networks": shortened(rows), "threshold": bar, "customers": config.customers, "innocents": INNOCENTS}


def shortened(found: Any) -> Any:
    """Results with five digits of each number, so that those of many suspects stay small."""
    if isinstance(found, float):
        return float(f"{found:.5g}")
    if isinstance(found, dict):
        return {name: shortened(one) for name, one in found.items()}
    return [shortened(one) for one in found] if isinstance(found, list) else found


def _epochs(name: str, config: Config) -> int:
    return config.transformer_epochs if name.startswith(("ViT", "Swin")) else config.epochs


def _network(name: str, config: Config, seed: int, meter: sections.Meter) -> dict[str, Any]:
    entry = zoo.networks()[name]

    def train(seed: int) -> Subject:
        note = lambda *_: meter.step(f"train {name}")  # noqa: E731
        return networks.train(entry.network, seed, _epochs(name, config), note, config.train_images)

    subject = train(seed)
    owner = _owner(name, subject, config, seed)
    copy = embedding.embed(subject.base, owner.mark, owner.word)
    graph = alignment.trace_graph(subject.apply_fn, subject.base, subject.test_images[:1])
    rewrites, damaged, forms, independents = [], [], [], []
    logits = _logits(subject)
    before = logits(copy)
    for number in range(config.compositions):
        suspect = attacks.rewrite(copy, graph, jax.random.key(1000 * seed + number))
        change = float(np.abs(logits(suspect) - before).max())
        raw = _traced(owner, suspect)
        unaligned = {name: raw[name] for name in ("T", "traced", "wrong")}
        rewrites.append({"logits": change, **_read(owner, suspect), "unaligned": unaligned})
        meter.step(f"{name}: {sum(row['traced'] for row in rewrites)} of {len(rewrites)} traced")
    for number, damage in enumerate(config.damages):
        for order in ORDERS:
            suspect = _damaged(copy, subject, graph, damage, order, jax.random.key(1000 * seed + 100 + number))
            about = {"damage": damage, "order": order, "accuracy": subject.accuracy(suspect)}
            damaged.append({**about, **_read(owner, suspect)})
            meter.step(f"{name}: {damage}, {order}")
    for form, change_form in FORMS.items():
        suspect = change_form(_trees.named("architectures", attacks.rewrite(copy, graph, jax.random.key(seed))))
        forms.append({"form": form, **_any_answer(owner, suspect)})
        meter.step(f"{name}: {form}")
    init, shape = networks.functional(entry.network).init, subject.test_images.shape[1:]
    for number in range(config.independents + config.untrained):
        trained, other = number < config.independents, seed + 1000 + number
        stranger = train(other).base if trained else init(jax.random.key(other), shape)
        about = {"trained": trained, "accuracy": subject.accuracy(stranger)}
        independents.append({**about, **_read(owner, stranger)})
        meter.step(f"{name}: an independent network")
    return {
        "network": name,
        "weights": entry.weights,
        "accuracy": subject.accuracy(subject.base),
        "accuracy_of_copy": subject.accuracy(copy),
        "strength": float(owner.mark.strength),
        "unfollowed": list(graph.unfollowed),
        "beyond": list(graph.beyond),
        "intact": _traced(owner, copy)["T"],
        "rewrites": rewrites,
        "damaged": damaged,
        "forms": forms,
        "independents": independents,
    }


def _owner(name: str, subject: Subject, config: Config, seed: int) -> Owner:
    """The mark has the strength that the desk would give it: by unlabelled images that the shape has not seen."""
    secret = functools.partial(networks.secret, seed, "architectures", name)
    mark = carriers.mark(secret("carrier"), subject.base, config.num_chips, shape=networks.shape(subject))
    found = embedding.calibrate(
        subject.base, mark, subject.apply_fn, subject.images[:_IMAGES], max_change=config.max_change
    )
    book = codes.Codebook(secret("code"), config.customers, config.num_chips)
    leaker = int(np.random.default_rng([seed, list(zoo.networks()).index(name)]).integers(config.customers))
    innocents = np.setdiff1d(np.arange(min(INNOCENTS + 1, config.customers)), [leaker])[:INNOCENTS]
    word = np.asarray(codes.codebook(book.key, [leaker], config.num_chips)[0])
    others = np.asarray(codes.codebook(book.key, innocents, config.num_chips), np.float64)
    return Owner(subject, mark._replace(strength=found.strength), book, leaker, word, others)


def _logits(subject: Subject) -> Callable[[PyTree], np.ndarray]:
    answer, images = _compiling.quickly(subject.apply_fn), jnp.asarray(subject.test_images[:_IMAGES])
    return lambda params: np.asarray(answer(params, images))


def _damaged(copy: PyTree, subject: Subject, graph: alignment.Graph, damage: str, order: str, key: jax.Array) -> PyTree:
    """The copy after one rewrite and one damage."""
    if order == "damage first":
        return attacks.rewrite(DAMAGES[damage](copy, subject, key), graph, key)
    return DAMAGES[damage](attacks.rewrite(copy, graph, key), subject, key)


def _traced(owner: Owner, params: PyTree) -> dict[str, Any]:
    """T of the leaker and of innocents, and who is accused, of weights in the base's layout."""
    chips = np.asarray(extraction.extract(params, owner.subject.base, owner.mark), np.float64)
    accused = {one.serial for one in tracing.trace(chips, owner.book, ALPHA).accused}
    innocents = owner.others @ statistics.direction(chips)
    return {
        "T": pipeline.statistic(chips, owner.word),
        "traced": owner.leaker in accused,
        "accused": len(accused),
        "wrong": len(accused - {owner.leaker}),
        "innocent_mean": float(innocents.mean()),
        "innocent_largest": float(np.abs(innocents).max()),
    }


def _read(owner: Owner, suspect: PyTree) -> dict[str, Any]:
    """What alignment answers, in how many seconds; and the trace of the best alignment, even where it refuses."""
    subject, reason = owner.subject, ""
    began = time.perf_counter()
    try:
        answer, found = "copy", alignment.align(suspect, subject.base, subject.apply_fn, subject.test_images[:1])
    except errors.NothingMatched as error:
        answer, found, reason = "not a copy", error.attempt, str(error)
    except errors.Undecided as error:
        answer, found, reason = "undecided", error.attempt, str(error)
    about = {"answer": answer, "reason": reason, "seconds": time.perf_counter() - began}
    if found is None:
        return {**about, **_NOTHING}
    trace = _traced(owner, found.params)
    # A refused suspect is traced to nobody; that others would be accused counts all the same.
    return {**about, "similarity": found.report.similarity, **trace, "traced": trace["traced"] and answer == "copy"}


def _any_answer(owner: Owner, suspect: PyTree) -> dict[str, Any]:
    """As :func:`_read`; whatever else is raised is a result, and not the end of the experiment."""
    began = time.perf_counter()
    try:
        return _read(owner, suspect)
    except Exception as error:
        answer, reason = "error", f"{type(error).__name__}: {error}"
    return {"answer": answer, "reason": reason, "seconds": time.perf_counter() - began, **_NOTHING}


Leaves = dict[str, Any]


def _largest(leaves: Leaves) -> str:
    return max((name for name in leaves if leaves[name].ndim > 1), key=lambda name: leaves[name].size)


def _cut(leaves: Leaves) -> Leaves:
    name = _largest(leaves)
    return {**leaves, name: leaves[name][..., : leaves[name].shape[-1] // 2]}


def _widened(leaves: Leaves) -> Leaves:
    name = _largest(leaves)
    return {**leaves, name: jnp.concatenate([leaves[name], leaves[name][..., ::-1]], axis=-1)}


def _narrowed(leaves: Leaves) -> Leaves:
    half = lambda leaf: leaf[tuple(slice(n // 2 if n > 10 else n) for n in leaf.shape)]  # noqa: E731
    return {name: half(leaf) for name, leaf in leaves.items()}


def _shortened(leaves: Leaves) -> Leaves:
    return dict(list(leaves.items())[: 2 * len(leaves) // 3])


FORMS: dict[str, Callable[[Leaves], Leaves]] = {
    "kernel cut": _cut,
    "kernel doubled": _widened,
    "half as wide": _narrowed,
    "leaves missing": _shortened,
}
"""Rewritten copies of another width or depth, from their leaves by name: half or twice as many outputs of the largest
kernel, all axes halved but the short ones, the last third of the leaves missing."""
