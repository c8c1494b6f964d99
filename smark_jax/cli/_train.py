"""``smark train``: a base model from a configuration, trained across parties under masks; a killed run goes on.

What must never leave the owner lies in the folder ``private``: the key of the owner's mark, the weights that the mark
is read against, and the last checkpoint, with the parties' secrets and the optimiser's state, which holds the mark too.
"""

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import jax
import numpy as np
import rich.console

from smark_jax import _disk, _validate, data, errors, files, keys, models, parallel
from smark_jax._types import PyTree
from smark_jax.cli import _checkpoints, _train_config, _training

OUTPUTS = ("base.safetensors", "results.json", "training.png")
_NETWORKS = {"cnn": models.CNN, "resnet18": models.ResNet18}


def run(config: _train_config.Config, out: Path, console: rich.console.Console) -> dict[str, Any]:
    """Trains, or goes on, and returns the results; writes ``base.safetensors``, ``results.json``, ``training.png``.

    Raises:
      SmarkError: when ``out`` holds a run of another configuration, or another process is at work there.
    """
    began = time.perf_counter()
    private = out / "private"
    _refuse_others_files(private, out)
    out.mkdir(parents=True, exist_ok=True)
    private.mkdir(mode=0o700, exist_ok=True)
    with _alone(private):
        _same_config(config, private / "config.json", out)
        if (out / "results.json").exists():
            _training.say(console, f"{out} holds this model already; nothing is left to do.")
            shutil.rmtree(private / "checkpoints", ignore_errors=True)
            (out / "base.safetensors").chmod(0o600)  # versions before left it readable for everybody
            return json.loads((out / "results.json").read_text())
        _training.before_jax(config.parties)
        _training.say(console, f"Loading {config.dataset} ...")
        train = data.load(config.dataset, config.train_split)
        test = data.load(config.dataset, config.test_split)
        network = _NETWORKS[config.network](num_classes=train.num_classes)
        apply_fn = models.apply_fn(network)
        start = _start(private / "start.safetensors", network, config.seed, train.images)
        key = _owner_key(private / "owner.key") if config.owner_mark else None
        owner = _training.owner_mark(start, key) if key else None
        recipe = _training.Recipe(*(getattr(config, name) for name in _training.Recipe._fields))
        ready = _training.prepare(recipe, apply_fn, train, owner)
        params, round_losses = _checkpoints.fit(
            ready,
            start,
            config.parties,
            config.checkpoint_every,
            _checkpoints.environment_of(train, config.parties),
            private / "checkpoints",
            console,
        )
        with _disk.private_files():
            digest = files.write(out / "base.safetensors", params)
        epochs = np.asarray(round_losses).reshape(config.epochs, -1).mean(axis=1)
        _picture(out / "training.png", round_losses, epochs, console)
        results = {
            "config": config._asdict(),
            "base_sha256": files.content_hash(files.flatten(params)),
            "file_sha256": digest,
            "accuracy": models.accuracy(apply_fn, params, test.images, test.labels),
            "loss": [round(float(loss), 6) for loss in epochs],
            "rounds": ready.rounds,
            "owner_mark_log10_p": _training.owner_log10_p(params, owner) if owner else None,
            "owner_key_commitment": keys.commitment(key) if key else None,
            "devices": [str(device) for device in parallel.devices(config.parties)],
            "seconds": round(time.perf_counter() - began, 1),
        }
        _write(out / "results.json", json.dumps(results, indent=2) + "\n")
        shutil.rmtree(private / "checkpoints")
        return results


def show(console: rich.console.Console, out: Path, results: dict[str, Any]) -> None:
    """Prints what came of it, and what to do next."""
    _training.say(console, f"Accuracy {results['accuracy']:.4f} on {results['config']['test_split']}.")
    if results["owner_mark_log10_p"] is not None:
        odds = f"1e{math.floor(results['owner_mark_log10_p']) + 1}"
        _training.say(console, f"The owner's mark reads; chance would do that with a probability below {odds}.")
        _training.say(
            console, f"Keep {out / 'private'} secret, and back it up: the mark is proved with what lies there."
        )
    _training.say(
        console, f"The base model, {out / 'base.safetensors'}, goes to nobody. Next: smark add-model VAULT NAME BASE"
    )


# --- The folder ---


@contextlib.contextmanager
def _alone(private: Path) -> Iterator[None]:
    """Two runs in one folder would use the same secrets; the operating system frees the lock with the process."""
    lock = filelock.FileLock(private / ".lock")
    try:
        with lock.acquire(timeout=0):
            yield
    except filelock.Timeout as error:
        cause = "Wait for it, or choose another folder with --out."
        raise _validate.fail(
            "train", f"{private.parent} to itself", "another smark train at work there", cause, kind=errors.InUse
        ) from error


def _refuse_others_files(private: Path, out: Path) -> None:
    """A run writes over no file but its own."""
    there = [name for name in OUTPUTS if (out / name).exists()]
    if there and not (private / "config.json").exists():
        cause = "Choose another folder with --out, or move them."
        raise _validate.fail("train", f"a new folder, or that of a run, in {out}", f"{', '.join(there)} there", cause)


def _same_config(config: _train_config.Config, path: Path, out: Path) -> None:
    if not path.exists():
        with _disk.private_files():
            _write(path, json.dumps(config._asdict(), indent=2) + "\n")
        return
    before = json.loads(path.read_text())
    changed = [f"{name} {before.get(name)!r}" for name, value in config._asdict().items() if before.get(name) != value]
    if changed:
        got = f"one that began with {', '.join(changed)}"
        cause = "Choose another folder with --out, or go on with the configuration it began with."
        raise _validate.fail("train", f"a run of this configuration in {out}", got, cause)


def _start(path: Path, network: Any, seed: int, images: np.ndarray) -> PyTree:
    """The weights that training starts from, which the owner's mark is read against: drawn once, then kept."""
    if not path.exists():
        with _disk.private_files():
            files.write(path, models.init(network, jax.random.key(seed), images.shape[1:]))
    return files.nest(files.read(path).leaves)


def _owner_key(path: Path) -> keys.SecretKey:
    if not path.exists():
        with _disk.private_files():
            _write(path, keys.new().to_bytes().hex() + "\n")
    try:
        return keys.from_bytes(bytes.fromhex(path.read_text().strip()))
    except ValueError:  # without its cause, which would show part of the key
        raise _validate.fail(
            "train", f"64 hexadecimal digits in {path}", "something else", "Restore your copy."
        ) from None


def _write(path: Path, text: str) -> None:
    """All of it or nothing, also when the machine stops."""
    new = path.with_name(f"{path.name}.new")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _picture(path: Path, rounds: np.ndarray, epochs: np.ndarray, console: rich.console.Console) -> None:
    """The training curve: every round's loss, and each epoch's mean."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogFormatter
    except ImportError:
        _training.say(console, f"{path.name} is left out, since it needs matplotlib: pip install 'smark-jax[demo]'")
        return
    figure = Figure(figsize=(8, 4), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    numbers = np.arange(1, len(rounds) + 1)
    axes.plot(numbers, rounds, lw=0.7, color="0.7", label="each round")
    middles = numbers.reshape(len(epochs), -1).mean(axis=1)
    axes.plot(middles, epochs, "o-", ms=3.5, lw=1.8, color="#1f5f8b", label="mean of an epoch")
    axes.set(xlabel="round", yscale="log", title="Mean loss of the parties, in nats")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(LogFormatter())  # which leaves some out where there is no room for all
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
