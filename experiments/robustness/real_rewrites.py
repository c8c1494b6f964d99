"""Networks that others trained, under random members of all rewrites that leave their function alone, and rounding.

All channels move, linear bottlenecks take another basis, batch norms are folded; int8 comes before or after. As a
control, networks of the same form and other weights must not be called copies. A ViT-B/16, for which no package has
weights, has random ones: its seconds and its memory are what counts.
"""

import dataclasses
import functools
import math
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

from experiments.common import networks, pipeline, real, sections
from experiments.common.networks import ALPHA
from experiments.common.zoo import transformers
from experiments.robustness.real_networks import NETWORKS
from smark_jax import _compiling, alignment, attacks, carriers, codes, embedding, extraction, statistics
from smark_jax._types import PyTree

Change = Callable[[PyTree, alignment.Graph, jax.Array], PyTree]
SUSPECTS: dict[str, Change] = {
    "rewritten": attacks.rewrite,
    "rewritten, int8": lambda copy, graph, key: attacks.quantise(attacks.rewrite(copy, graph, key), 8),
    "int8, rewritten": lambda copy, graph, key: attacks.rewrite(attacks.quantise(copy, 8), graph, key),
    "rewritten, 50 % pruned": lambda copy, graph, key: attacks.prune(attacks.rewrite(copy, graph, key), 0.5),
}
_LARGE = "ViT-B/16, random weights"


def _vit() -> real.Network:
    """As published, with gains about one and biases about zero."""
    net: Any = transformers.ViT(width=768, heads=12, blocks=12, patch=16, classes=1000)
    functions, rng = networks.functional(net), np.random.default_rng(0)
    params = jax.tree.map(np.asarray, functions.init(jax.random.key(0), (224, 224, 3)))
    params = jax.tree.map(
        lambda leaf: leaf + (0.1 * rng.normal(size=leaf.shape)).astype(leaf.dtype) * (leaf.ndim < 3), params
    )
    return real.Network(_LARGE, params, functions.apply_fn, lambda images: images.astype(np.float32), 1000, "head", ())


SOURCES: dict[str, Callable[[], real.Network]] = {**NETWORKS, _LARGE: _vit}


@dataclasses.dataclass(frozen=True)
class Config:
    """Each kind of suspect is drawn ``draws`` times; the mark is one of weights alone, of the default strength."""

    networks: tuple[str, ...] = tuple(SOURCES)
    draws: int = 3
    customers: int = 10**6
    num_chips: int = 304


QUICK = Config(("OpenNSFW",), draws=1, customers=10**4)
FULL = Config()


def run(config: Config, seed: int, meter: sections.Meter) -> sections.Result:
    steps = {name: len(_drawn(name, config)) + 1 for name in config.networks}
    meter.start(sum(steps.values()))
    rows = [
        meter.part(name, steps[name], functools.partial(_network, name, config, seed, meter))
        for name in config.networks
    ]
    bar = statistics.threshold(np.ones(config.num_chips), math.log(ALPHA / config.customers))
    return {"networks": rows, "threshold": bar, "customers": config.customers}


def _drawn(name: str, config: Config) -> list[tuple[int, str]]:
    """Numbers and kinds of the suspects; of the large network, one."""
    return [(draw, kind) for draw in range(config.draws) for kind in SUSPECTS][: 1 if name == _LARGE else None]


def _network(name: str, config: Config, seed: int, meter: sections.Meter) -> dict[str, Any]:
    network = SOURCES[name]()
    base, apply_fn = network.params, network.apply_fn
    image = network.preprocess(np.zeros((1, 224, 224, 3), np.uint8))
    noise = np.random.default_rng(seed).normal(size=np.shape(image)).astype(np.float32)
    run, graph = _compiling.quickly(apply_fn), alignment.trace_graph(apply_fn, base, image)
    mark = carriers.mark(_secret(seed, name, "carrier"), base, config.num_chips, shape=carriers.shape(base))
    book = codes.Codebook(_secret(seed, name, "code"), config.customers, config.num_chips)
    leaker = int(np.random.default_rng([seed, config.customers]).integers(config.customers))
    word = np.asarray(codes.codebook(book.key, [leaker], config.num_chips)[0])
    copy = embedding.embed(base, mark, word)
    logits = np.asarray(run(copy, noise))

    def judged(suspect: PyTree) -> dict[str, Any]:
        found = pipeline.judge(suspect, base, apply_fn, image, mark, book)
        raw = pipeline.statistic(np.asarray(extraction.extract(suspect, base, mark), np.float64), word)
        return {
            "T": found.statistic(word),
            "raw": raw,
            "refused": found.refused,
            "traced": leaker in found.accused,
            "wrong": len(found.accused - {leaker}),
            "seconds": found.seconds,
            "logits": float(np.abs(np.asarray(run(suspect, noise)) - logits).max() / np.ptp(logits)),
        }

    suspects = []
    for draw, kind in _drawn(name, config):
        suspect = SUSPECTS[kind](copy, graph, jax.random.key(1000 * seed + draw))
        suspects.append({"suspect": kind, **judged(suspect)})
        meter.step(f"{name}: {kind}, T {suspects[-1]['T']:.1f}")
    stranger = _shuffled(base, np.random.default_rng([seed, 1]))
    other = judged(stranger)
    meter.step(f"{name}: another network")
    return {
        "network": name,
        "weights": sum(int(np.size(leaf)) for leaf in jax.tree.leaves(base)),
        "channels": int(sum(graph.sizes)),
        "linear": int(sum(space.blocks * space.width for space in graph.linear)),
        "unfollowed": list(graph.unfollowed),
        "suspects": suspects,
        "another": other,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def _secret(seed: int, name: str, use: str) -> Any:
    return sections.secret(seed, "experiments.robustness", "real rewrites", name, use)


def _shuffled(base: PyTree, rng: np.random.Generator) -> PyTree:
    """A network of the same form that shares no weight with the base but their distribution."""
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.permutation(np.asarray(leaf).reshape(-1)).reshape(np.shape(leaf))), base
    )


def show(console: rich.console.Console, result: sections.Result) -> None:
    for row in result["networks"]:
        table = rich.table.Table(
            *("suspect", "traced", "T", "T without alignment", "logits' change", "median s"),
            title=f"{row['network']}: {row['channels']:,} channels moved, {row['linear']:,} more mixed; "
            f"accused from T {result['threshold']:.1f}",
            title_justify="left",
        )
        for kind in dict.fromkeys(one["suspect"] for one in row["suspects"]):
            some = [one for one in row["suspects"] if one["suspect"] == kind]
            statistics_ = [one["T"] for one in some]
            table.add_row(
                kind,
                f"{sum(one['traced'] for one in some)}/{len(some)}",
                f"{min(statistics_):.1f} to {max(statistics_):.1f}",
                f"{max((one['raw'] for one in some), key=abs):.1f}",
                f"{max(one['logits'] for one in some):.0e}",
                f"{np.median([one['seconds'] for one in some]):.0f}",
            )
        console.print(table)
        other = row["another"]
        answer = "refused" if other["refused"] else "called a copy"
        console.print(
            f"Another network of this form is {answer} in {other['seconds']:.0f} s, T {other['T']:.1f}; "
            f"peak of the process {row['peak_gb']:.1f} GB."
        )


def picture(path: Path, result: sections.Result) -> None:
    rows = result["networks"]
    with sections.figure(path, 8, 1.2 + 1.4 * len(rows)) as figure:
        every = np.atleast_1d(figure.subplots(len(rows), 1))
        for axes, row in zip(every, rows, strict=True):
            kinds = list(SUSPECTS)
            for name, marker in (("T", "o"), ("raw", "x")):
                values = [(one[name], kinds.index(one["suspect"])) for one in row["suspects"]]
                label = {"T": "aligned", "raw": "without alignment"}[name]
                axes.plot(*zip(*values, strict=True), marker, label=label)
            axes.axvline(result["threshold"], color="tab:red", lw=1, label="accused above")
            axes.set(yticks=range(len(kinds)), yticklabels=kinds, xlabel="T of the leaker", title=row["network"])
            axes.invert_yaxis()
        figure.legend(*every[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
