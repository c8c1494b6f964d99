"""Marks on networks that others trained: what a copy costs on natural images, and what a leaker leaves of the trace."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.table
from jax import Array

from experiments.common import intervals, pipeline, real, sections
from experiments.common.networks import ALPHA
from smark_jax import _batches, aggregation, attacks, carriers, codes, embedding, extraction, statistics
from smark_jax._types import ApplyFn, PyTree
from smark_jax.carriers import inputs

NETWORKS: dict[str, Callable[[], real.Network]] = {
    "EfficientNet-Lite0": real.efficientnet_lite0,
    "OpenNSFW": real.opennsfw,
}
_BATCH = 16
_SURE = 0.5


@dataclasses.dataclass(frozen=True)
class Config:
    """Crops for the shape, for the strength and for judging are parts of different pictures.

    Of the marks that channels are compared with, ``few_copies`` are made. The first copy is attacked, and ``after``
    crops tell what is left of the network then. ``coalitions`` are numbers of chips and of colluders.
    """

    networks: tuple[str, ...] = tuple(NETWORKS)
    marks: tuple[str, ...] = ("channels", "weights only", "white, weakened", "white")
    shape_images: int = 48
    strength_images: int = 48
    judging_images: int = 500
    after: int = 60
    copies: int = 20
    few_copies: int = 3
    customers: int = 10**6
    num_chips: int = 304
    max_change: float = embedding.MAX_CHANGE
    tuning_steps: int = 8
    coalitions: tuple[tuple[int, int], ...] = ((304, 10), (1024, 20), (4096, 50))
    only: tuple[str, ...] | None = None


QUICK = Config(
    ("EfficientNet-Lite0",),
    judging_images=100,
    after=20,
    copies=3,
    customers=10**4,
    marks=("channels", "white"),
    tuning_steps=2,
    coalitions=((304, 8),),
)
FULL = Config()


class Field(NamedTuple):
    """A network, its function in a form that is fast on CPUs, its logits, and the images of each use."""

    network: real.Network
    apply_fn: ApplyFn
    logits: Callable[[PyTree, np.ndarray], np.ndarray]
    shape: np.ndarray
    strength: np.ndarray
    judging: np.ndarray


def _field(name: str, config: Config) -> Field:
    network = NETWORKS[name]()
    apply_fn = functools.partial(inputs.interpret, network.apply_fn)  # depthwise kernels are faster so
    run = jax.jit(apply_fn)

    def logits(params: PyTree, images: np.ndarray) -> np.ndarray:
        return _batches.apply(functools.partial(run, params), _BATCH, images).astype(np.float64)

    crops = lambda use, number: network.preprocess(real.natural_images(use, number).images)  # noqa: E731
    shape, strength = crops("shape", config.shape_images), crops("strength", config.strength_images)
    return Field(network, apply_fn, logits, shape, strength, crops("judging", config.judging_images))


def run(config: Config, seed: int, meter: sections.Meter) -> sections.Result:
    fields = {name: _field(name, config) for name in config.networks}
    before = {name: field.logits(field.network.params, field.judging) for name, field in fields.items()}
    attacked = sum(len(_attacks(field, config, seed)) for field in fields.values())
    meter.start(sum(len(fields) * (_copies(kind, config) + 1) + attacked for kind in config.marks))
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in fields}
    for kind in config.marks:  # the first kind on all networks first: it is what the others are compared with
        for name, field in fields.items():
            row = functools.partial(_row, kind, field, before[name], config, seed, meter)
            rows[name].append(meter.part(f"{name} {kind}", 1, row))
    sure = {name: int((_softmax(logits).max(axis=1) > _SURE).sum()) for name, logits in before.items()}
    images = config.judging_images
    found = [{"network": name, "images": images, "sure": sure[name], "rows": rows[name]} for name in fields]
    bar = statistics.threshold(np.ones(config.num_chips), math.log(ALPHA / config.customers))
    return {"networks": found, "threshold": bar, "num_chips": config.num_chips}


def _row(
    kind: str, field: Field, before: np.ndarray, config: Config, seed: int, meter: sections.Meter
) -> dict[str, Any]:
    """One kind of mark on one network."""
    base = field.network.params
    key = sections.secret(seed, "experiments.robustness", "real", field.network.name, kind)
    mark = _marked(kind, key, field, config)
    meter.step(f"{kind}: strength {float(mark.strength):.2g}")
    code = sections.secret(seed, "experiments.robustness", "real", "code")
    book = codes.Codebook(code, config.customers, config.num_chips)
    words = np.asarray(codes.codebook(code, range(_copies(kind, config)), config.num_chips))
    copies = []
    for number, word in enumerate(words):
        copy = embedding.embed(base, mark, word)
        intact = pipeline.statistic(extraction.extract(copy, base, mark), word)
        copies.append({**harm(before, field.logits(copy, field.judging)), "T": intact})
        meter.step(f"{kind}: copy {number}")
    leaked = embedding.embed(base, mark, words[0])
    survived = []
    for name, attack in _attacks(field, config, seed).items():
        suspect = attack(leaked)
        judged = pipeline.judge(suspect, base, field.network.apply_fn, field.shape[:1], mark, book)
        after = field.logits(suspect, field.judging[: config.after])
        survived.append(
            {
                "attack": name,
                "T": judged.statistic(words[0]),
                "refused": judged.refused,
                "traced": 0 in judged.accused,
                "wrong": len(judged.accused - {0}),
                "same": float((after.argmax(axis=1) == before[: config.after].argmax(axis=1)).mean()),
            }
        )
        meter.step(f"{kind}: {name}")
    stored = None if mark.shape is None else mark.shape.num_stored
    row = {"mark": kind, "strength": float(mark.strength), "stored": stored, "copies": copies, "attacks": survived}
    if kind == "channels":
        row["coalitions"] = [_coalition(field, mark, before, *one, config, seed) for one in config.coalitions]
    return row


def _coalition(
    field: Field, mark: carriers.Mark, before: np.ndarray, num_chips: int, colluders: int, config: Config, seed: int
) -> dict[str, Any]:
    """The mean of several customers' copies, with a mark of another number of chips but the same shape and strength."""
    base, name = field.network.params, field.network.name
    key = sections.secret(seed, "experiments.robustness", "real", name, "coalition", str(num_chips))
    other = carriers.mark(key, base, num_chips, shape=mark.shape)._replace(strength=mark.strength)
    book = codes.Codebook(key, config.customers, num_chips)
    serials = np.random.default_rng([seed, num_chips]).choice(config.customers, colluders, replace=False)
    words = codes.codebook(key, serials, num_chips)
    mixed = attacks.average(aggregation.stack([embedding.embed(base, other, word) for word in words]))
    judged = pipeline.judge(mixed, base, field.network.apply_fn, field.shape[:1], other, book)
    guilty = frozenset(serials.tolist())
    after = field.logits(mixed, field.judging[: config.after])
    return {
        "chips": num_chips,
        "colluders": colluders,
        "caught": len(judged.accused & guilty),
        "wrong": len(judged.accused - guilty),
        "same": float((after.argmax(axis=1) == before[: config.after].argmax(axis=1)).mean()),
    }


def _copies(kind: str, config: Config) -> int:
    return config.copies if kind == "channels" else min(config.copies, config.few_copies)


def _marked(kind: str, key: Any, field: Field, config: Config) -> carriers.Mark:
    """A mark with which a copy's logits change by ``max_change`` (white, weights only: of the default strength)."""
    base, apply_fn = field.network.params, field.network.apply_fn
    shape = None
    if kind == "weights only":
        shape = carriers.shape(base)
    elif kind == "channels":
        shape = carriers.shape(base, apply_fn, field.shape)
    mark = carriers.mark(key, base, config.num_chips, shape=shape)
    if kind in ("white", "weights only"):  # nobody can run the network, or nobody asked
        return mark
    found = embedding.calibrate(base, mark, apply_fn, field.strength, max_change=config.max_change)
    return mark._replace(strength=found.strength)


def harm(before: np.ndarray, after: np.ndarray) -> dict[str, float | int]:
    """What a copy does to the answers: those that stay, of all and of those of which the base was sure, and distances.

    Args:
      before: the base's logits, shape [N, classes].
      after: the copy's.

    Returns:
      ``same`` and ``same_sure``: numbers of answers; ``kl``: the mean Kullback-Leibler divergence in nats; ``change``:
      the relative change of the logits less their mean over classes, by root mean squares.
    """
    same, p, q = before.argmax(axis=1) == after.argmax(axis=1), _softmax(before), _softmax(after)
    kl = (p * (np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(q, 1e-300)))).sum(axis=1)
    centre = lambda z: z - z.mean(axis=1, keepdims=True)  # noqa: E731
    change = np.sqrt(np.square(centre(after - before)).mean() / np.square(centre(before)).mean())
    sure = p.max(axis=1) > _SURE
    return {
        "same": int(same.sum()),
        "same_sure": int(same[sure].sum()),
        "kl": float(kl.mean()),
        "change": float(change),
    }


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _attacks(field: Field, config: Config, seed: int) -> dict[str, Callable[[PyTree], PyTree]]:
    """Removal attacks without labels, by name; the leaker has the images of the shape."""
    key, apply_fn, images = jax.random.key(seed), field.network.apply_fn, field.shape
    new_head = functools.partial(_renewed, match=field.network.head, key=key)
    noise = functools.partial(attacks.add_noise, key=key, relative=0.3)
    project = functools.partial(attacks.project_inputs, apply_fn=apply_fn, images=images, key=key)

    def everything(copy: PyTree) -> PyTree:
        copy = new_head(project(copy, keep=0.999))
        return per_channel(attacks.prune(noise(copy), 0.5), 4)

    found: dict[str, Callable[[PyTree], PyTree]] = {
        "none": lambda copy: copy,
        "float16": functools.partial(attacks.cast, dtype=jnp.float16),
        "int8": functools.partial(attacks.quantise, bits=8),
        "int4 by channel": functools.partial(per_channel, bits=4),
        "prune 50 %": functools.partial(attacks.prune, fraction=0.5),
        "noise 30 %": noise,
        "new head": new_head,
        **{
            f"new stage {number}": functools.partial(_renewed, match=match, key=key)
            for number, match in enumerate(field.network.stages, 1)
        },
        "PCA 99 %": functools.partial(project, keep=0.99),
        "PCA 99.9 %, new head, noise, prune, int4": everything,
        "fine-tuned on its own answers": lambda copy: attacks.fine_tune(
            copy,
            field.apply_fn,
            images,
            attacks.predicted_labels(copy, field.apply_fn, images),
            epochs=config.tuning_steps,
            batch_size=8,
            optimizer=optax.adam(1e-4),
            seed=seed,
        ),
    }
    return {name: attack for name, attack in found.items() if config.only is None or name in config.only}


def per_channel(params: PyTree, bits: int) -> PyTree:
    """Rounds kernels to 2^bits - 1 levels, evenly spaced in each output channel: the first axis, as in PyTorch."""
    levels = 2 ** (bits - 1) - 1

    def rounded(leaf: Array) -> Array:
        if leaf.ndim < 2:
            return leaf
        step = jnp.abs(leaf).max(axis=tuple(range(1, leaf.ndim)), keepdims=True) / levels
        step = jnp.maximum(step, 1e-30)
        return jnp.round(leaf / step) * step

    return jax.tree.map(lambda leaf: rounded(jnp.asarray(leaf)), params)


def _renewed(copy: PyTree, match: str, key: Array) -> PyTree:
    """Untrained layers in place of those that match: kernels of random weights with the same RMS, norms at one."""
    keys = dict(zip(copy, jax.random.split(key, len(copy)), strict=True))

    def fresh(name: str, leaf: Array) -> Array:
        if leaf.ndim > 1:
            return jnp.sqrt(jnp.mean(jnp.square(leaf))) * jax.random.normal(keys[name], leaf.shape, leaf.dtype)
        if name.endswith((".running_mean", ".running_var")):
            return leaf
        return jnp.full_like(leaf, name.endswith(".weight"))

    return attacks.reinitialise(copy, {name: fresh(name, jnp.asarray(leaf)) for name, leaf in copy.items()}, match)


def show(console: rich.console.Console, result: sections.Result) -> None:
    for network in result["networks"]:
        number, sure = network["images"], network["sure"]
        table = rich.table.Table(
            *("mark", "strength", "same answer", "worst copy", f"of {sure} sure", "KL [nats]", "logits' change", "T"),
            title=f"{network['network']}: copies on {number} natural crops; 95 % intervals are of the first copy",
            title_justify="left",
        )
        for row in network["rows"]:
            values = {name: [copy[name] for copy in row["copies"]] for name in row["copies"][0]}
            low, high = intervals.clopper_pearson(values["same"][0], number, 0.95)
            table.add_row(
                row["mark"],
                f"{row['strength']:.2g}",
                f"{np.mean(values['same']) / number:.2%} [{low:.1%}, {high:.1%}]",
                f"{min(values['same']) / number:.2%}",
                f"{min(values['same_sure']) / max(sure, 1):.2%}",
                f"{np.mean(values['kl']):.2g}",
                f"{np.mean(values['change']):.2g}",
                f"{np.mean(values['T']):.2f}",
            )
        console.print(table)
        table = rich.table.Table(
            "attack",
            *(f"{row['mark']}: T (same answer)" for row in network["rows"]),
            title=f"{network['network']} attacked; accused from T {result['threshold']:.1f}",
            title_justify="left",
        )
        for attack in zip(*(row["attacks"] for row in network["rows"]), strict=True):
            cells = [f"{one['T']:.1f}{_outcome(one)} ({one['same']:.0%})" for one in attack]
            table.add_row(attack[0]["attack"], *cells)
        console.print(table)
        for one in [one for row in network["rows"] for one in row.get("coalitions", ())]:
            console.print(
                f"{network['network']}: mean of {one['colluders']} copies at {one['chips']:,} chips: "
                f"{one['caught']} caught, {one['wrong']} innocents accused"
            )


def _outcome(attack: dict[str, Any]) -> str:
    if attack["traced"]:
        return ""
    return ", not aligned" if attack["refused"] else ", not traced"


def picture(path: Path, result: sections.Result) -> None:
    networks = result["networks"]
    with sections.figure(path, 9, 1.5 + 0.22 * sum(len(n["rows"][0]["attacks"]) for n in networks)) as figure:
        for axes, network in zip(np.atleast_1d(figure.subplots(len(networks), 1)), networks, strict=True):
            names = [one["attack"] for one in network["rows"][0]["attacks"]]
            for number, row in enumerate(network["rows"]):
                same = np.mean([copy["same"] for copy in row["copies"]]) / network["images"]
                label = f"{row['mark']}: {same:.1%} of answers stay"
                axes.plot([one["T"] for one in row["attacks"]], range(len(names)), "osD^v<>"[number], label=label)
            axes.axvline(result["threshold"], color="0.4", lw=1)
            axes.axvline(result["num_chips"] ** 0.5, color="0.8", lw=1)
            axes.set(yticks=range(len(names)), yticklabels=names, xlabel="T of the leaker", title=network["network"])
            axes.invert_yaxis()
            axes.legend(fontsize=7)
