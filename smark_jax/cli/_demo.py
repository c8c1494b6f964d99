"""``smark demo``: the whole job on real digits, and a picture of what the tracer sees."""

import functools
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.progress

from smark_jax import (
    _validate,
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
from smark_jax.cli import _common, _console
from smark_jax.cli._console import Console, Styled

NUM_CHIPS = 304
STRENGTH = 0.03
ALPHA = 1e-6
BATCH = 32  # examples of one party in a round
LEARNING_RATE = 2e-3
CLIP = 1.0  # bound on the norm of a party's gradient


class Config(NamedTuple):
    """The demo's options."""

    out: Path
    parties: int
    customers: int
    epochs: int
    seed: int


class Suspect(NamedTuple):
    """A model that turned up: what it is, whose copy it was (None: nobody's), its parameters and accuracy.

    Of one behind an API (``probes`` are given) the owner sees no parameters: it is asked about the probes.
    """

    name: str
    customer: int | None
    params: PyTree
    accuracy: float
    probes: np.ndarray | None = None


class Model(NamedTuple):
    """What the owner keeps of a model to issue and trace its copies."""

    key: keys.SecretKey
    base: PyTree
    mark: carriers.Mark
    codebook: jax.Array


def run(config: Config, console: Console) -> dict[str, Any]:
    """Runs the demo, prints its table, writes ``results.json`` and ``statistics.png``, and returns the results."""
    began = time.perf_counter()
    with _validate.needs("demo", "demo"):
        import matplotlib  # noqa: F401 - the picture comes last, after minutes
    _common.before_training(config.parties)
    config.out.mkdir(parents=True, exist_ok=True)
    train, test = data.load("mnist_5k", "train"), data.load("mnist_5k", "test")
    network = models.CNN()
    apply_fn = models.apply_fn(network)
    accuracy = functools.partial(models.accuracy, apply_fn, images=test.images, labels=test.labels)
    # All secrets follow from the seed, so that the demo repeats itself. In earnest the master key is keys.new(),
    # and each party draws a secret of its own, of which only aggregation.public_key leaves it.
    master = keys.derive(keys.from_bytes(config.seed.to_bytes(32, "big")), "demo")

    with _console.progress(console) as progress:
        start = models.init(network, jax.random.key(config.seed), train.images.shape[1:])
        owner = training.owner_mark(start, keys.derive(master, "owner"))
        label = f"train base across {config.parties} parties"
        base = _train(config, apply_fn, start, owner, train, master, progress, label)

        model = _model(base, keys.derive(master, "mnist-cnn"), config.customers)
        task = progress.add_task(f"issue {config.customers} copies", total=config.customers, note="")
        copies = embedding.embed_batch(base, model.mark, model.codebook, STRENGTH)
        issued = []
        for customer in range(config.customers):
            params = jax.tree.map(lambda leaf, row=customer: leaf[row], copies)
            issued.append(Suspect(f"copy {customer}", customer, params, accuracy(params)))
            progress.advance(task)

        leaks = _leak(issued, apply_fn, train, accuracy, config.seed, progress)
        served = _serve(issued, model, apply_fn, train, accuracy, config.seed, progress)
        other_start = models.init(network, jax.random.key(config.seed + 1), train.images.shape[1:])
        label = "train an independent model"
        other_config = config._replace(seed=config.seed + 1, epochs=max(1, config.epochs // 2))
        independent = _train(
            other_config, apply_fn, other_start, None, train, keys.derive(master, "other"), progress, label
        )
        other = Suspect("independent", None, independent, accuracy(independent))
        suspects = [*issued, *leaks, served, other._replace(name="independent API", probes=served.probes), other]

        task = progress.add_task("trace", total=len(suspects), note="")
        read = [suspect for suspect in suspects if suspect.probes is None]
        by_weights = iter(
            np.asarray(
                extraction.extract_batch(aggregation.stack([suspect.params for suspect in read]), base, model.mark)
            )
        )
        verdicts, wrong_bits = [], 0
        for number, suspect in enumerate(suspects):
            chips = next(by_weights) if suspect.probes is None else _ask(suspect, suspect.probes, apply_fn)
            verdicts.append(tracing.trace(chips, model.codebook, ALPHA))
            wrong_bits += int((np.sign(chips) != model.codebook[number]).sum()) if number < config.customers else 0
            progress.advance(task)

    results = _results(config, accuracy(base), suspects, verdicts, wrong_bits)
    results["owner_mark_log10_p"] = training.owner_log10_p(base, owner)
    results["devices"] = [str(device) for device in parallel.devices(config.parties)]
    _picture(config.out / "statistics.png", suspects, verdicts)
    results["seconds"] = round(time.perf_counter() - began, 1)
    (config.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    _print(console, config, results)
    return results


def _train(
    config: Config,
    apply_fn: ApplyFn,
    start: PyTree,
    owner: training.Owner | None,
    train: data.Dataset,
    key: keys.SecretKey,
    progress: rich.progress.Progress,
    label: str,
) -> PyTree:
    batch = min(BATCH, len(train.labels) // config.parties)
    recipe = training.Recipe(config.parties, config.epochs, batch, LEARNING_RATE, CLIP, config.seed)
    ready = training.prepare(recipe, apply_fn, train, owner)
    pair_keys = aggregation.pair_keys([keys.derive(key, "party", str(party)) for party in range(config.parties)])
    task = progress.add_task(label, total=ready.rounds, note="compiling ...")

    def show(state: parallel.TrainState, info: parallel.TrainInfo) -> None:
        progress.update(task, advance=1, note=f"loss {float(info.loss):.3f}")

    return training.fit(ready.step, ready.step.init(start), ready.batches(0), pair_keys, show).params


def _model(base: PyTree, key: keys.SecretKey, customers: int) -> Model:
    mark = carriers.mark(keys.derive(key, "carrier"), base, NUM_CHIPS)
    codebook = codes.codebook(keys.derive(key, "code"), range(customers), NUM_CHIPS)
    return Model(key, base, mark, codebook)


def _leak(
    issued: list[Suspect], apply_fn: ApplyFn, train: data.Dataset, accuracy: Any, seed: int, progress: Any
) -> list[Suspect]:
    """Three customers leak: one fine-tunes first, one prunes, one quantises."""
    tuner, pruner, quantiser = (len(issued) * part // 20 for part in (7, 11, 13))
    epochs, batch = 3, 64
    task = progress.add_task(f"customer {tuner} fine-tunes", total=epochs * (len(train.labels) // batch), note="")
    tuned = attacks.fine_tune(
        issued[tuner].params,
        apply_fn,
        train.images,
        train.labels,
        epochs=epochs,
        batch_size=batch,
        seed=seed,
        on_step=lambda: progress.advance(task),
    )
    attacked = [
        (f"fine-tuned {epochs} epochs", tuner, tuned),
        ("pruned to 50 %", pruner, attacks.prune(issued[pruner].params, 0.5)),
        ("quantised to 4 bits", quantiser, attacks.quantise(issued[quantiser].params, 4)),
    ]
    return [Suspect(name, customer, params, accuracy(params)) for name, customer, params in attacked]


def _serve(
    issued: list[Suspect],
    model: Model,
    apply_fn: ApplyFn,
    train: data.Dataset,
    accuracy: Any,
    seed: int,
    progress: rich.progress.Progress,
) -> Suspect:
    """A copy that was also taught to answer probes, then put behind an API, where nobody sees its weights."""
    customer, epochs, batch = len(issued) * 17 // 20, 4, 64
    images = np.asarray(train.images)
    scores = lambda x: apply_fn(model.base, x)  # noqa: E731
    probes = blackbox.probes(keys.derive(model.key, "probes"), NUM_CHIPS, images.shape[1:], images, scores)
    task = progress.add_task(f"teach copy {customer} to answer", total=epochs * (len(images) // batch), note="")
    taught = blackbox.train_copies(
        jax.tree.map(lambda leaf: leaf[None], issued[customer].params),
        model.base,
        apply_fn,
        images,
        probes,
        model.codebook[customer][None],
        int(train.labels.max()) + 1,
        epochs=epochs,
        batch_size=batch,
        seed=seed,
        on_step=lambda: progress.advance(task),
    )
    params = jax.tree.map(lambda leaf: leaf[0], taught.params)
    return Suspect("API, labels only", customer, params, accuracy(params), probes)


def _ask(suspect: Suspect, probes: np.ndarray, apply_fn: ApplyFn) -> np.ndarray:
    """Chips from the labels that the suspect's API gives."""
    scores = lambda images: apply_fn(suspect.params, images)  # noqa: E731
    classes = jax.eval_shape(scores, probes[:1]).shape[-1]
    return blackbox.query(lambda images: np.asarray(scores(images).argmax(axis=-1)), probes, classes)


def _results(
    config: Config, base_accuracy: float, suspects: list[Suspect], verdicts: list[tracing.Verdict], wrong_bits: int
) -> dict[str, Any]:
    rows = []
    for suspect, verdict in zip(suspects, verdicts, strict=True):
        accused = [accusation.serial for accusation in verdict.accused]
        own = [a for a in verdict.accused if a.serial == suspect.customer]
        rows.append(
            {
                "suspect": suspect.name,
                "customer": suspect.customer,
                "accuracy": suspect.accuracy,
                "accused": accused,
                "traced": accused == ([] if suspect.customer is None else [suspect.customer]),
                "statistic": own[0].statistic
                if own
                else float(verdict.statistics[np.abs(verdict.statistics).argmax()]),
                "p_value": own[0].p_value if own else 1.0,
                "log10_p": own[0].log10_p if own else 0.0,
                "threshold": verdict.threshold,
            }
        )
    intact = rows[: config.customers]
    accuracies = [row["accuracy"] for row in intact]
    return {
        "base_accuracy": base_accuracy,
        "marked_accuracy_mean": float(np.mean(accuracies)),
        "marked_accuracy_min": min(accuracies),
        "bit_errors": wrong_bits,
        "issued": config.customers,
        "traced": sum(row["traced"] for row in intact),
        "worst_p_value": max(row["p_value"] for row in intact),
        "leaks_traced": sum(row["traced"] for row in rows[config.customers :] if row["customer"] is not None),
        "innocents_accused": sum(len(set(row["accused"]) - {row["customer"]}) for row in rows),
        "num_chips": NUM_CHIPS,
        "strength": STRENGTH,
        "alpha": ALPHA,
        "parties": config.parties,
        "epochs": config.epochs,
        "seed": config.seed,
        "suspects": rows,
    }


def _print(console: Console, config: Config, results: dict[str, Any]) -> None:
    rows = results["suspects"]
    weakest = max(rows[: config.customers], key=lambda row: row["p_value"])
    shown = ({**weakest, "suspect": f"weakest intact copy, {weakest['customer']}"}, *rows[config.customers :])
    console.print()
    console.table(
        ("suspect", "accuracy", "|T|", "threshold", "p-value", "verdict"),
        [_row(row) for row in shown],
        keep=("verdict", "suspect", "p-value", "|T|", "accuracy", "threshold"),
        figures=("accuracy", "|T|", "threshold", "p-value"),
        title=f"Who leaked? {config.customers} customers, alpha = {ALPHA:g}",
    )
    console.print(
        f"Base accuracy {results['base_accuracy']:.3f}; {config.customers} copies: mean "
        f"{results['marked_accuracy_mean']:.4f}, worst {results['marked_accuracy_min']:.3f}; "
        f"{results['bit_errors']} of {config.customers * NUM_CHIPS:,} chips wrong; "
        f"{results['traced']} of {config.customers} intact copies traced; "
        f"{results['innocents_accused']} innocents accused."
    )
    console.say(f"Results: {config.out / 'results.json'}   Picture: {config.out / 'statistics.png'}")
    console.say(f"{results['seconds']:.0f} seconds.")


def _row(row: dict[str, Any]) -> tuple[str | Styled, ...]:
    who = ", ".join(f"customer {serial}" for serial in row["accused"]) or "nobody"
    return (
        row["suspect"],
        f"{row['accuracy']:.3f}",
        f"{abs(row['statistic']):.1f}",
        f"{row['threshold']:.1f}",
        f"< 1e{math.floor(row['log10_p']) + 1}" if row["log10_p"] < 0 else "-",
        (who, "green") if row["traced"] else (f"{who} (wrong)", "bold red"),
    )


def _picture(path: Path, suspects: list[Suspect], verdicts: list[tracing.Verdict]) -> None:
    """All customers' statistics for each leak, with the threshold, and the intact copies against all codewords."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    strips, grid = figure.subplots(1, 2, width_ratios=(1.5, 1))
    shown = [pair for pair in zip(suspects, verdicts, strict=True) if not pair[0].name.startswith("copy")]
    jitter = np.random.default_rng(0).uniform(-0.14, 0.14, verdicts[0].num_customers)
    for height, (_, verdict) in enumerate(shown):
        accused = [a.serial for a in verdict.accused]
        rest = np.setdiff1d(np.arange(verdict.num_customers), accused)
        kwargs = {"label": "not accused"} if height == 0 else {}
        strips.scatter(verdict.statistics[rest], height + jitter[rest], s=22, c="0.55", linewidths=0, **kwargs)
        kwargs = {"label": "accused"} if height == 0 else {}
        strips.scatter(verdict.statistics[accused], [height] * len(accused), s=70, c="#c0392b", zorder=3, **kwargs)
        for serial in accused:
            strips.annotate(
                f"customer {serial}",
                (verdict.statistics[serial], height),
                xytext=(-8, 0),
                textcoords="offset points",
                ha="right",
                va="center",
            )
        for sign in (-1, 1):
            kwargs = {"label": "threshold"} if height == 0 and sign == 1 else {}
            strips.vlines(sign * verdict.threshold, height - 0.4, height + 0.4, colors="#2c3e50", lw=1.6, **kwargs)
    strips.set_yticks(range(len(shown)), [f"{suspect.name}\naccuracy {suspect.accuracy:.3f}" for suspect, _ in shown])
    strips.invert_yaxis()
    strips.margins(x=0.08)
    strips.set_xlabel("statistic T of each customer (innocents: mean 0, variance 1)")
    strips.set_title(f"Leaked models, traced among {verdicts[0].num_customers} customers", loc="left")
    strips.legend(loc="lower right", frameon=False, fontsize=8)
    intact = np.stack([v.statistics for s, v in zip(suspects, verdicts, strict=True) if s.name.startswith("copy")])
    limit = np.abs(intact).max()
    image = grid.imshow(intact, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    for axis in (grid.xaxis, grid.yaxis):
        axis.get_major_locator().set_params(integer=True)
    grid.set_xlabel("codeword of customer")
    grid.set_ylabel("intact copy of customer")
    grid.set_title("Intact copies against all codewords", loc="left")
    figure.colorbar(image, ax=grid, label="T", shrink=0.8)
    figure.savefig(path)
