"""Performance targets, case by case: against PyTorch, against the same step without masks or marks, and the machine."""

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.table

from experiments.benchmarks import floor_side, race, tables
from experiments.benchmarks.race import Entry, Timing, find
from experiments.common import sections
from smark_jax import files, models

CNN_WEIGHTS = 421_642


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes; ``rounds`` of each race, fewer where they would take more than ``seconds``.

    ``dense_gigabytes`` are what PyTorch's projection may take; ``models`` are (name, dtype, weights, chips).
    """

    rounds: int
    seconds: float
    epochs: int
    copies: int
    scored: int
    dense_gigabytes: float
    num_weights: int = 11_000_000
    num_chips: int = 304
    customers: int = 10**6
    most_customers: int = 10**8
    parties: int = 4
    batch: int = 64
    models: tuple[tuple[str, str, int, int], ...] = (
        ("ResNet-50", "float32", 0, 304),
        ("ViT-B/16", "float32", 0, 304),
        ("ViT-B/16", "bfloat16", 0, 304),
        ("eight layers", "float32", 25_000_000, 65_536),
    )


QUICK = Config(
    rounds=3,
    seconds=6,
    epochs=2,
    copies=100,
    scored=5,
    dense_gigabytes=1,
    most_customers=10**7,
    models=(("ViT-B/16", "float32", 0, 304),),
)
FULL = Config(15, 60, epochs=6, copies=1000, scored=30, dense_gigabytes=4)

Found = dict[str, Any]


def run(config: Config, seed: int, meter: sections.Meter) -> sections.Result:
    setting = race.setting()
    cases: dict[str, Callable[..., Found]] = {
        "training": _training,
        "carrier": _carrier,
        "losses": _losses,
        "copies": _copies,
        "verdict": _verdict,
        "models": _models,
    }
    tell = lambda note: meter.step(note, 0)  # noqa: E731
    meter.start(1 + len(cases))
    rates = meter.part("rates", 0, lambda: measured_rates(setting, tell))
    meter.step("rates of the machine")
    targets: list[Found] = []
    timings: list[Timing] = list(rates["timings"])
    for name, case in cases.items():
        found = meter.part(name, 0, lambda case=case: case(config, setting, seed, tell))
        meter.step(name)
        targets += found["targets"]
        timings += found["timings"]
    known = floor_side.Rates(**rates["rates"])
    for timing in timings:
        floor = floor_side.floor(known, timing["case"], timing["arm"], timing["params"])
        timing["floor"] = timing.get("floor") or floor
    targets.append(_beside_floor(find(timings, "jax", "verdict", num_customers=config.customers, decoder="single")))
    machine = race.machine(setting, ours(timings), seed)
    return {"machine": machine, "rates": rates["rates"], "targets": targets, "timings": timings}


def _beside_floor(timing: Timing | None) -> Found:
    assert timing and timing["floor"]
    what = (
        f"verdict among {timing['params']['num_customers']:,} over its floor: the keystream, and a pass over its words"
    )
    return target(what, timing["median"] / timing["floor"], 2, at_most=True, unit="x")


def ours(timings: Sequence[Timing]) -> str:
    """The device that smark_jax ran on."""
    return next((timing["device"] for timing in timings if timing["side"] == "jax"), "none")


def measured_rates(setting: race.Setting, tell: Callable[[str], None]) -> Found:
    """What the machine can do, in bytes and operations a second."""
    entry = Entry("floor", "rates", {"megabytes": 256, "matrix": 1024, "threads": setting.threads})
    timings = race.race([entry], setting, 7, on_lap=tell)
    return {"timings": timings, "rates": race.rates(timings)}


def target(what: str, measured: float | None, bound: float, *, at_most: bool, unit: str = "") -> Found:
    """One line of the table of targets; met is None where a side was missing."""
    met = None if measured is None else (measured <= bound if at_most else measured >= bound)
    return {"what": what, "measured": measured, "bound": bound, "at_most": at_most, "unit": unit, "met": met}


def fastest(timings: Sequence[Timing]) -> Timing | None:
    """The timing with the smallest median; None of none."""
    return min(timings, key=lambda timing: timing["median"], default=None)


def times(slow: Timing | None, fast: Timing | None) -> float | None:
    """How many times as fast the second is as the first; None where one did not run."""
    return race.ratio(slow, fast) if slow and fast else None


def _training(config: Config, setting: race.Setting, seed: int, tell: Callable[[str], None]) -> Found:
    params = {"parties": config.parties, "batch": config.batch, "seed": seed}
    entries = [
        Entry("jax", "train", params),
        Entry("torch", "train", params),
    ]
    timings = race.race(entries, setting, 3 * config.rounds, seconds=config.seconds, on_lap=tell)
    plain = find(timings, "jax", "plain")
    marked = find(timings, "jax", "masks and fingerprint")
    assert plain and marked
    step = f"training step of the CNN, {config.parties} parties"
    cost = 100 * (race.ratio(marked, plain) - 1)
    theirs = fastest([timing for timing in timings if timing["side"] == "torch"])
    targets = [
        target(f"{step}: masks and fingerprint beyond a plain psum", cost, 8, at_most=True, unit="%"),
        target(f"{step}, a plain psum, over PyTorch's", times(plain, theirs), 1, at_most=True, unit="x"),
    ]
    return {"timings": timings, "targets": targets}


def _carrier(config: Config, setting: race.Setting, seed: int, tell: Callable[[str], None]) -> Found:
    """At D = 11M against one copy of the weights; against the dense projection at the largest D that it can hold."""
    dense = int(config.dense_gigabytes * 1e9 / (4 * config.num_chips))
    large = {"num_weights": config.num_weights, "num_chips": config.num_chips, "seed": seed}
    held = {**large, "num_weights": dense}
    arms = ("spread", "despread")
    alone = race.race([Entry("jax", "weights", large)], setting, config.rounds, seconds=config.seconds, on_lap=tell)
    entries = [Entry("jax", "weights", held, arms), Entry("torch", "weights", held, arms)]
    beside = race.race(entries, setting, config.rounds, seconds=config.seconds, on_lap=tell)
    copy = find(alone, "jax", "copy")
    targets = []
    for arm in arms:
        what = f"{arm} at D = {config.num_weights:,}, against one copy of the weights"
        targets.append(target(what, times(find(alone, "jax", arm), copy), 3, at_most=True, unit="x"))
    for arm in arms:
        what = f"{arm}, times as fast as PyTorch's dense projection at D = {dense:,} ({config.dense_gigabytes:g} GB)"
        faster = times(find(beside, "torch", arm), find(beside, "jax", arm))
        targets.append(target(what, faster, 20, at_most=False, unit="x"))
    return {"timings": alone + beside, "targets": targets}


def _losses(config: Config, setting: race.Setting, seed: int, tell: Callable[[str], None]) -> Found:
    params = {"num_weights": CNN_WEIGHTS, "num_chips": config.num_chips, "seed": seed}
    entries = [Entry(side, "losses", params) for side in ("jax", "torch")]
    return {"timings": race.race(entries, setting, config.rounds, seconds=config.seconds, on_lap=tell), "targets": []}


def _copies(config: Config, setting: race.Setting, seed: int, tell: Callable[[str], None]) -> Found:
    """Copies of a trained CNN on disk, beside the bare writing of as many bytes and PyTorch's fine-tuning."""
    Path("out").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".benchmarks-", dir="out") as name:
        folder = str(Path(name).absolute())
        model = f"{folder}/model.npz"
        size = trained(model, config.epochs, seed, tell)
        disk = {"num_copies": config.copies, "folder": folder}
        entries = [
            Entry("jax", "disk", {**disk, "model": model, "scored": config.scored, "seed": seed}),
            Entry("floor", "disk", {**disk, "num_bytes": size}),
            Entry("torch", "tune", {"model": model, "num_chips": config.num_chips, "seed": seed}),
        ]
        timings = race.race(entries, setting, config.rounds, seconds=2 * config.seconds, on_lap=tell)
    for timing in timings:  # file paths are private and stay out of the results
        timing["params"] = {key: value for key, value in timing["params"].items() if key not in ("folder", "model")}
    write = find(timings, "floor", "write")
    tuned = fastest([timing for timing in timings if timing["side"] == "torch"])
    targets = []
    for arm, how in (("issue", "vault.issuing.issue"), ("write", "embed_batch and files.write")):
        timing = find(timings, "jax", arm)
        assert timing and write
        timing["floor"] = write["median"]
        share = 100 * race.ratio(write, timing) * timing["facts"]["bytes"][0] / write["facts"]["bytes"][0]
        what = f"{config.copies:,} copies of the CNN to disk by {how}: share of the machine's write rate"
        targets.append(target(what, share, 85, at_most=False, unit="%"))
    issue = find(timings, "jax", "issue")
    assert issue
    faster = config.copies * race.ratio(tuned, issue) if tuned else None
    what = "a copy on disk, times as fast as PyTorch's fine-tuning with Uchida's loss"
    targets.append(target(what, faster, 25, at_most=False, unit="x"))
    gain = 100 * (np.mean(issue["facts"]["accuracy"]) - np.mean(tuned["facts"]["accuracy"])) if tuned else None
    what = "its accuracy on held-out digits, less that of the fine-tuned copies"
    targets.append(target(what, None if gain is None else float(gain), 0, at_most=False, unit="points"))
    return {"timings": timings, "targets": targets}


def trained(path: str, epochs: int, seed: int, tell: Callable[[str], None]) -> int:
    """Trains the CNN on MNIST-5k and saves weights and digits for the workers; returns the size of a copy's file."""
    from experiments.common import networks

    tell(f"train the CNN for {epochs} epochs")
    subject = networks.train(models.CNN(), seed, epochs)
    leaves = files.flatten(subject.base)
    arrays: dict[str, Any] = {f"weights:{name}": leaf for name, leaf in leaves.items()}
    arrays |= {"train_images": subject.images, "train_labels": subject.labels}
    np.savez(path, **arrays, test_images=subject.test_images, test_labels=subject.test_labels)
    copy = Path(path).with_suffix(".safetensors")
    files.write(copy, leaves)
    return copy.stat().st_size


def _verdict(config: Config, setting: race.Setting, seed: int, tell: Callable[[str], None]) -> Found:
    params = {"num_customers": config.customers, "num_chips": config.num_chips, "seed": seed}
    hows = {
        "blocks": "codewords in blocks",
        "tables": "by tables",
        "cipher": "by tables, codewords from ChaCha20",
        "held": "all codewords held",
    }
    entries = [
        Entry("jax", "verdict", {**params, "decoder": "single"}),
        # In separate workers, since peak memory is measured per worker.
        *(Entry("torch", "verdict", params, (arm,)) for arm in hows),
        Entry("jax", "verdict", {**params, "decoder": "joint"}),
    ]
    timings = race.race(entries, setting, config.rounds, seconds=config.seconds, on_lap=tell)
    large = {**params, "num_customers": config.most_customers, "decoder": "single", "keep": False}
    timings += race.race([Entry("jax", "verdict", large)], setting, 3, seconds=config.seconds, on_lap=tell)
    ours = find(timings, "jax", "verdict", num_customers=config.customers, decoder="single")
    all_of_them = find(timings, "jax", "verdict", num_customers=config.most_customers)
    assert ours and all_of_them
    targets = []
    for arm, how in hows.items():
        theirs = find(timings, "torch", arm)
        what = f"verdict among {config.customers:,}, times as fast as PyTorch, {how}"
        targets.append(target(what, times(theirs, ours), 2, at_most=False, unit="x"))
        what = f"its memory beyond the imports in PyTorch, {how}, over ours"
        targets.append(target(what, used(theirs) / used(ours) if theirs else None, 4, at_most=False, unit="x"))
    what = f"verdict among {config.most_customers:,}, seconds for each hundred million"
    seconds = all_of_them["median"] * 1e8 / config.most_customers
    targets.append(target(what, seconds, 5, at_most=True, unit="s"))
    what = "its memory beyond the imports, over that among the few"
    targets.append(target(what, used(all_of_them) / used(ours), 1.5, at_most=True, unit="x"))
    return {"timings": timings, "targets": targets}


def used(timing: Timing) -> float:
    """Megabytes at the peak of a worker, beyond what interpreter and libraries took; NaN where there is no /proc."""
    return timing["peak_mb"] - timing["imported_mb"] if timing["peak_mb"] else float("nan")


def _models(config: Config, setting: race.Setting, seed: int, tell: Callable[[str], None]) -> Found:
    timings, targets = [], []
    Path("out").mkdir(exist_ok=True)
    for name, dtype, num_weights, num_chips in config.models:
        with tempfile.TemporaryDirectory(prefix=".benchmarks-", dir="out") as folder:
            params = {"name": name, "dtype": dtype, "num_weights": num_weights, "num_chips": num_chips, "seed": seed}
            entry = Entry("jax", "model", {**params, "folder": str(Path(folder).absolute())})
            found = race.race([entry], setting, config.rounds, seconds=config.seconds / 2, on_lap=tell)
        for timing in found:
            timing["params"] = params
        timings += found
        if name == "ViT-B/16":
            peak = found[-1]["peak_mb"]
            what = f"{name}, {dtype}: embed, issue, extract and trace, peak memory of the process"
            targets.append(target(what, peak and peak / 1e3, 6, at_most=True, unit="GB"))
    return {"timings": timings, "targets": targets}


def show(console: rich.console.Console, result: sections.Result) -> None:
    tables.show_machine(console, result)
    tables.show_timings(console, result["timings"])
    show_targets(console, result["targets"])


def show_targets(console: rich.console.Console, targets: Sequence[Found]) -> None:
    table = rich.table.Table(title="What was aimed at", title_justify="left")
    for column in ("what", "target", "measured", "met"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in targets:
        sign = "at most" if row["at_most"] else "at least"
        measured = "not measured" if row["measured"] is None else f"{row['measured']:.3g} {row['unit']}"
        met = {True: "[green]yes[/green]", False: "[bold red]no[/bold red]", None: "-"}[row["met"]]
        table.add_row(row["what"], f"{sign} {row['bound']:g} {row['unit']}", measured, met)
    console.print(table)


def picture(path: Path, result: sections.Result) -> None:
    """The targets as bars on a logarithmic axis: to the right of 1 is better than aimed at."""
    rows: Sequence[Found] = [row for row in result["targets"] if row["measured"] and row["bound"]]
    rows = [row for row in rows if row["measured"] > 0]
    ratios = [row["bound"] / row["measured"] if row["at_most"] else row["measured"] / row["bound"] for row in rows]
    with sections.figure(path, 11, 1.2 + 0.42 * max(1, len(rows))) as fig:
        axes = fig.subplots()
        places = np.arange(len(rows))
        axes.barh(
            places, np.array(ratios) - 1, left=1, color=["#2c6fa8" if value >= 1 else "#c0392b" for value in ratios]
        )
        for place, row, value in zip(places, rows, ratios, strict=True):
            text = f" {row['measured']:.3g} {row['unit']} "
            axes.annotate(text, (value, place), va="center", ha="left" if value >= 1 else "right", fontsize=8)
        axes.set_xscale("log")
        tables.plain_ticks(axes.xaxis, [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16])
        axes.axvline(1, color="0.1", lw=1)
        axes.margins(x=0.15)
        axes.set_yticks(places, [row["what"] for row in rows], fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel("times better than the target (1 is the target itself)")
        fig.suptitle(tables.machine_line(result), fontsize=8)
