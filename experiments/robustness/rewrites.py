"""Compositions of rewrites that preserve the network's function, traced with and without alignment."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.table

from experiments.common import networks, sections
from experiments.common.networks import ALPHA, CUSTOMERS, Subject
from smark_jax import alignment, attacks, carriers, codes, embedding, errors, extraction, models, statistics, tracing
from smark_jax._types import PyTree

INNOCENTS = 1000


@dataclasses.dataclass(frozen=True)
class Config:
    """``combined`` are the kinds of dummy neurons that come with damage; ``large`` aligns a full ResNet-18 too."""

    compositions: int
    epochs: int
    networks: tuple[str, ...] = ("CNN", "ResNet-18", "concatenating")
    train_images: int | None = None
    customers: int = CUSTOMERS
    num_chips: int = 304
    strength: float = 0.03
    combined: tuple[str, ...] = ("zero", "clique", "split")
    large: bool = True


QUICK = Config(compositions=5, epochs=2, large=False)
FULL = Config(compositions=50, epochs=6)


def compose(params: PyTree, graph: alignment.Graph, rng: np.random.Generator) -> tuple[PyTree, list[str]]:
    """Three to five rewrites, drawn at random; always a permutation among them."""
    folds = ["fold"] if isinstance(params, dict) and "batch_stats" in params else []
    kinds = ["permute", "rescale", "zero", "clique", "split", *folds]
    names: list[Any] = [str(name) for name in rng.choice(kinds, rng.integers(2, 5))]
    names.insert(int(rng.integers(len(names) + 1)), "permute")
    for name in names:
        key = jax.random.key(int(rng.integers(2**31)))
        if name == "permute":
            params = attacks.permute(params, graph, key)
        elif name == "rescale":
            params = attacks.rescale(params, graph, key, float(rng.uniform(0.2, 1)))
        elif name == "fold":
            params = attacks.fold_batch_norm(params, graph)
        else:
            params = attacks.add_neurons(params, graph, key, float(rng.uniform(0.05, 0.25)), name)
    return params, names


def run(config: Config, seed: int, meter: sections.Meter) -> sections.Result:
    chosen = {name: networks.networks()[name] for name in config.networks}
    training = networks.steps(config.epochs, config.train_images or 4000)
    meter.start(len(chosen) * (training + config.compositions + 2) + config.large)
    rows = []
    for number, (name, network) in enumerate(chosen.items()):
        subject = networks.train(
            network, seed, config.epochs, lambda *_, n=name: meter.step(f"train {n}"), config.train_images
        )
        rows.append({"network": name, **_one(name, network, subject, config, [seed, number], meter)})
    large = _large(seed) if config.large else None
    if large:
        meter.step("ResNet-18 at full width")
    return {"networks": rows, "large": large}


def _one(
    name: str, network: Any, subject: Subject, config: Config, seeds: Sequence[int], meter: sections.Meter
) -> dict[str, Any]:
    rng = np.random.default_rng(list(seeds))
    base, images = subject.base, subject.test_images[:64]
    mark = carriers.mark(networks.secret(seeds[0], name, "carrier"), base, config.num_chips)
    book = codes.Codebook(networks.secret(seeds[0], name, "code"), config.customers, config.num_chips)
    graph = alignment.trace_graph(subject.apply_fn, base, images)
    leaker = int(rng.integers(config.customers))
    word = codes.codebook(book.key, [leaker], config.num_chips)[0]
    copy = embedding.embed(base, mark, word, config.strength)
    logits = np.asarray(subject.any_width(copy, jnp.asarray(images)))
    innocents = np.setdiff1d(np.arange(INNOCENTS + 1), [leaker])[:INNOCENTS]
    others_words = np.asarray(codes.codebook(book.key, innocents, config.num_chips), np.float64)

    def trace(params: PyTree) -> tuple[tracing.Verdict, float, np.ndarray]:
        chips = np.asarray(extraction.extract(params, base, mark, rectify=True), np.float64)
        norm = float(np.linalg.norm(chips)) or 1.0
        own = float(chips @ np.asarray(word, np.float64)) / norm
        return tracing.trace(chips, book, ALPHA), own, others_words @ chips / norm

    found: list[dict[str, Any]] = []
    means = []
    for _ in range(config.compositions):
        suspect, names = compose(copy, graph, rng)
        change = float(np.abs(np.asarray(subject.any_width(suspect, jnp.asarray(images))) - logits).max())
        began = time.perf_counter()
        aligned, report = alignment.align(suspect, base, subject.apply_fn, images)
        seconds = time.perf_counter() - began
        verdict, statistic, others = trace(aligned)
        means.append(float(others.mean()))
        raw, raw_statistic, _ = trace(_cut(suspect, base))
        found.append(
            {
                "rewrites": names,
                "logits": change,
                "seconds": seconds,
                "similarity": report.similarity,
                "T": statistic,
                "traced": [a.serial for a in verdict.accused] == [leaker],
                "T_unaligned": raw_statistic,
                "traced_unaligned": leaker in [a.serial for a in raw.accused],
                "wrong": len({a.serial for v in (verdict, raw) for a in v.accused} - {leaker}),
            }
        )
        meter.step(f"{name}: {sum(f['traced'] for f in found)} of {len(found)} traced")
    combined = _combined(subject, copy, graph, config.combined, trace, leaker, rng)
    meter.step(f"{name}: fine-tuning and rewrites")
    unrelated = _unrelated(models.init(network, jax.random.key(seeds[0] + 999), images.shape[1:]), subject, trace)
    meter.step(f"{name}: an unrelated model")
    return {
        "weights": sum(np.size(leaf) for leaf in jax.tree.leaves(base)),
        "accuracy": subject.accuracy(base),
        "accuracy_of_copy": subject.accuracy(copy),
        "compositions": found,
        # A thousand innocents share one read-out: their mean has a standard error of 1 / sqrt(1000) per suspect.
        "innocent_mean": float(np.mean(means)),
        "innocent_mean_largest": float(max(means, key=abs)),
        "standard_error": INNOCENTS**-0.5,
        "combined": combined,
        "unrelated": unrelated,
    }


def _unrelated(stranger: PyTree, subject: Subject, trace: Callable[..., Any]) -> dict[str, Any]:
    """What alignment and tracing make of a model of the same kind that is no copy."""
    try:
        attempt = alignment.align(stranger, subject.base, subject.apply_fn, subject.test_images[:64])
        refused = False
    except (errors.NothingMatched, errors.Undecided) as error:
        if error.attempt is None:
            raise
        attempt, refused = error.attempt, True
    verdict, _, others = trace(attempt.params)
    return {
        "refused": refused,
        "similarity": attempt.report.similarity,
        "accused": len(verdict.accused),
        "innocent_mean": float(others.mean()),
        "largest": float(np.abs(others).max()),
    }


def _combined(
    subject: Subject,
    copy: PyTree,
    graph: alignment.Graph,
    kinds: Sequence[str],
    trace: Any,
    leaker: int,
    rng: np.random.Generator,
) -> list[dict[str, Any]]:
    """Fine-tuning, 30 % pruning, permutation, scaling, 20 % dummy neurons: damage first, and rewrites first."""

    def damage(params: PyTree) -> PyTree:
        # Scaled channels need a smaller step than the original network.
        tuned = attacks.fine_tune(
            params, subject.any_width, subject.images, subject.labels, epochs=3, optimizer=optax.adam(3e-4)
        )
        return attacks.prune(tuned, 0.3)

    rows = []
    damaged = damage(copy)
    for kind in kinds:
        for order in ("damage first", "rewrites first"):
            key = [jax.random.key(int(k)) for k in rng.integers(2**31, size=3)]
            wide = attacks.add_neurons(damaged if order == "damage first" else copy, graph, key[0], 0.2, kind)
            suspect = attacks.rescale(attacks.permute(wide, graph, key[1]), graph, key[2])
            suspect = suspect if order == "damage first" else damage(suspect)
            aligned, report = alignment.align(suspect, subject.base, subject.apply_fn, subject.test_images[:1])
            verdict, statistic, _ = trace(aligned)
            rows.append(
                {
                    "kind": kind,
                    "order": order,
                    "accuracy": subject.accuracy(suspect),
                    "similarity": report.similarity,
                    "T": statistic,
                    "p": verdict.accused[0].p_value if verdict.accused else 1.0,
                    "traced": [a.serial for a in verdict.accused] == [leaker],
                }
            )
    return rows


def _cut(suspect: PyTree, base: PyTree) -> PyTree:
    """The control without alignment: what is wider than the base is cut off."""
    return jax.tree.map(lambda s, b: s[tuple(slice(0, n) for n in b.shape)], suspect, base)


def _large(seed: int) -> dict[str, Any]:
    """Seconds to align a rewritten ResNet-18 of 11 million weights (drawn at random: training does not matter)."""
    network, images = models.ResNet18(norm="batch"), np.zeros((1, 32, 32, 3), np.float32)
    base = models.init(network, jax.random.key(seed), images.shape[1:])
    apply_fn = models.apply_fn(network)
    graph = alignment.trace_graph(apply_fn, base, images)
    mark = carriers.mark(networks.secret(seed, "large"), base, 304)
    book = codes.Codebook(networks.secret(seed, "large", "code"), 1000, 304)
    word = codes.codebook(book.key, [7], 304)[0]
    copy = embedding.embed(base, mark, word)
    keys = jax.random.split(jax.random.key(seed), 3)
    suspect = attacks.add_neurons(copy, graph, keys[0], 0.1, "split")
    suspect = attacks.rescale(attacks.permute(suspect, graph, keys[1]), graph, keys[2])
    began = time.perf_counter()
    aligned, report = alignment.align(suspect, base, apply_fn, images)
    seconds = time.perf_counter() - began
    verdict = tracing.trace(extraction.extract(aligned, base, mark), book, ALPHA)
    weights = sum(np.size(leaf) for leaf in jax.tree.leaves(base))
    traced = [a.serial for a in verdict.accused] == [7]
    return {"weights": weights, "seconds": seconds, "similarity": report.similarity, "traced": traced}


def show(console: rich.console.Console, result: sections.Result) -> None:
    for table in (_compositions(result), _innocents(result), _combinations(result)):
        console.print(table)
    if result["large"]:
        large = result["large"]
        console.print(
            f"ResNet-18 of {large['weights']:,} weights: aligned in {large['seconds']:.0f} seconds, "
            f"similarity {large['similarity']:.3f}, {'traced' if large['traced'] else 'not traced'}"
        )


def _compositions(result: sections.Result) -> rich.table.Table:
    table = rich.table.Table(
        *("network", "weights", "accuracy", "logits changed by at most", "similarity", "T aligned", "traced"),
        *("T unaligned", "traced", "wrongly accused", "seconds"),
        title=f"Random compositions of rewrites, alpha {ALPHA:g}",
        title_justify="left",
    )
    for row in result["networks"]:
        found = row["compositions"]
        table.add_row(
            row["network"],
            f"{row['weights']:,}",
            f"{row['accuracy']:.3f}",
            f"{max(f['logits'] for f in found):.1e}",
            f"{min(f['similarity'] for f in found):.3f} or more",
            f"{min(f['T'] for f in found):.1f} to {max(f['T'] for f in found):.1f}",
            f"{sum(f['traced'] for f in found)} of {len(found)}",
            f"{max(abs(f['T_unaligned']) for f in found):.1f} at most",
            f"{sum(f['traced_unaligned'] for f in found)} of {len(found)}",
            str(sum(f["wrong"] for f in found)),
            f"{np.median([f['seconds'] for f in found]):.2f}",
        )
    return table


def _innocents(result: sections.Result) -> rich.table.Table:
    table = rich.table.Table(
        *("network", "mean over compositions", "largest of one", "standard error", "unrelated model", "similarity"),
        *("mean", "largest |T|", "accused"),
        title=f"{INNOCENTS:,} innocents after alignment",
        title_justify="left",
    )
    for row in result["networks"]:
        other = row["unrelated"]
        table.add_row(
            row["network"],
            f"{row['innocent_mean']:+.3f}",
            f"{row['innocent_mean_largest']:+.3f}",
            f"{row['standard_error']:.3f}",
            "refused" if other["refused"] else "matched",
            f"{other['similarity']:.2f}",
            f"{other['innocent_mean']:+.3f}",
            f"{other['largest']:.2f}",
            str(other["accused"]),
        )
    return table


def _combinations(result: sections.Result) -> rich.table.Table:
    table = rich.table.Table(
        *("network", "dummy neurons", "order", "accuracy", "similarity", "T", "p-value", "traced"),
        title="Fine-tuning, 30 % pruning, 20 % dummy neurons, permutation and scaling together",
        title_justify="left",
    )
    for row in result["networks"]:
        for line in row["combined"]:
            table.add_row(
                row["network"],
                line["kind"],
                line["order"],
                f"{line['accuracy']:.3f}",
                f"{line['similarity']:.3f}",
                f"{line['T']:.1f}",
                f"{line['p']:.1e}",
                "yes" if line["traced"] else "no",
            )
    return table


def picture(path: Path, result: sections.Result) -> None:
    with sections.figure(path, 7, 3.5) as figure:
        axes = figure.subplots()
        for at, row in enumerate(result["networks"]):
            found = row["compositions"]
            spread = np.linspace(-0.15, 0.15, len(found)) if len(found) > 1 else np.zeros(1)
            for offset, key, color in ((-0.2, "T_unaligned", "tab:gray"), (0.2, "T", "tab:blue")):
                label = {"T": "aligned", "T_unaligned": "as found"}[key] if at == 0 else None
                axes.plot(at + offset + spread, [f[key] for f in found], ".", color=color, label=label)
        bar = statistics.threshold(np.ones(304), math.log(ALPHA / CUSTOMERS))
        axes.axhline(bar, color="tab:red", lw=1, label="accused above, 1 in 1,000,000 customers")
        axes.set_xticks(range(len(result["networks"])), [row["network"] for row in result["networks"]])
        axes.set_ylabel("statistic T of the leaker")
        axes.set_title("Rewritten copies, each point a random composition")
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
