"""``smark train``: a base model from a configuration, trained across parties under masks; a killed run goes on.

What must never leave the owner lies in the folder ``private``: the key of the owner's mark, the weights that the mark is
read against, and the last checkpoint, whose optimiser's state holds the mark as well.

A checkpoint also holds the parties' secrets. They must be kept, since the rounding of a round depends on them: with fresh
ones the run would go on, but not to the same model. Two messages under one mask would show their difference, so the rounds
after a checkpoint are sent again only where they repeat bit for bit: on CPU devices, with the same software and the same
data. Anywhere else the parties agree new secrets. After each checkpoint every secret is replaced by one derived from it:
whoever takes the folder later opens no round before the checkpoint. At the end all are deleted.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import jax
import jaxlib
import numpy as np
import rich.console
import rich.progress
from orbax.checkpoint import v1 as ocp

import smark_jax
from smark_jax import _validate, aggregation, data, files, keys, models, parallel, training
from smark_jax._types import PyTree
from smark_jax.cli import _training, _train_config

_SECONDS_A_LOG_LINE = 20
_NETWORKS = {"cnn": models.CNN, "resnet18": models.ResNet18}


class Snapshot(NamedTuple):
    """What a checkpoint holds, beside the environment in its metadata.

    Attributes:
      state: of the training.
      secrets: the parties' secrets for the rounds from this one on, shape [P, 32].
      losses: of the rounds so far; NaN for the others, shape [rounds].
    """

    state: parallel.TrainState
    secrets: jax.Array
    losses: jax.Array


def run(config: _train_config.Config, out: Path, console: rich.console.Console) -> dict[str, Any]:
    """Trains, or goes on, and returns the results; writes ``base.safetensors``, ``results.json``, ``training.png``.

    Raises:
      ValueError: when ``out`` holds a run of another configuration, or another process is at work there.
    """
    began = time.perf_counter()
    private = out / "private"
    with _private_files():
        private.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _alone(private):
        _same_config(config, private / "config.json", out)
        if (out / "results.json").exists():
            console.print(f"{out} holds this model already; nothing is left to do.")
            return json.loads((out / "results.json").read_text())
        _training.ask_for_devices(config.parties)
        console.print(f"Loading {config.dataset} ...")
        train = data.load(config.dataset, config.train_split)
        test = data.load(config.dataset, config.test_split)
        network = _NETWORKS[config.network](num_classes=train.num_classes)
        apply_fn = models.apply_fn(network)
        start = _start(private / "start.safetensors", network, config.seed, train.images.shape[1:])
        key = _owner_key(private / "owner.key") if config.owner_mark else None
        owner = _training.owner_mark(start, key) if key else None
        recipe = _training.Recipe(*(getattr(config, name) for name in _training.Recipe._fields))
        ready = _training.prepare(recipe, apply_fn, train, owner)
        params, round_losses = _fit(config, ready, start, _environment(train), private / "checkpoints", console)
        digest = files.write(out / "base.safetensors", params)
        epochs = np.asarray(round_losses).reshape(config.epochs, -1).mean(axis=1)
        _picture(out / "training.png", round_losses, epochs, console)
        results = {
            "config": config._asdict(),
            "base_sha256": digest,
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
    console.print(f"Accuracy {results['accuracy']:.4f} on {results['config']['test_split']}.")
    if results["owner_mark_log10_p"] is not None:
        console.print(f"The owner's mark reads with a probability of chance below 1e{results['owner_mark_log10_p']:.0f}.")
        console.print(f"Keep {out / 'private'} secret, and back it up: the mark is proved with what lies there.")
    console.print(f"Base model: {out / 'base.safetensors'}; it goes to nobody. Next: smark add-model VAULT NAME BASE")


# --- Training with checkpoints ---


def _fit(
    config: _train_config.Config,
    ready: _training.Training,
    start: PyTree,
    environment: dict[str, Any],
    folder: Path,
    console: rich.console.Console,
) -> tuple[PyTree, np.ndarray]:
    """Runs all rounds, or those after the last checkpoint; the base's params and each round's loss."""
    every = config.checkpoint_every
    policy = ocp.training.preservation_policies.LatestN(1)
    with (
        _private_files(),
        ocp.training.Checkpointer(folder, preservation_policy=policy, cleanup_tmp_directories=True) as checkpoints,
        _training.progress(console) as progress,
    ):
        shot = _fresh(config.parties, ready, start)
        first = 0 if checkpoints.latest is None else checkpoints.latest.step
        if checkpoints.latest is None:
            checkpoints.save(0, shot, custom_metadata=environment)
        else:
            shot = _resumed(checkpoints, shot, environment, console)
        label = f"train {config.network} across {config.parties} parties"
        task = progress.add_task(label, total=ready.rounds, completed=first, note="compiling ...")
        meter = _Meter(progress, task, np.array(shot.losses))
        state, secrets, batches = shot.state, _keys(shot.secrets), ready.batches(first)
        for begin in range(first, ready.rounds, every):
            stretch = itertools.islice(batches, every)
            state = training.fit(ready.step, state, stretch, aggregation.pair_keys(secrets), meter)
            secrets = [keys.derive(secret, "next stretch") for secret in secrets]
            if begin + every < ready.rounds:
                checkpoints.save(begin + every, _snapshot(state, secrets, meter.losses), custom_metadata=environment)
    return state.params, meter.losses


class _Meter:
    """Called after each round: the progress display, in a log a line now and then, and the losses."""

    def __init__(self, progress: rich.progress.Progress, task: rich.progress.TaskID, losses: np.ndarray) -> None:
        self.losses = losses
        self._progress, self._task, self._printed = progress, task, time.monotonic()

    def __call__(self, state: parallel.TrainState, info: parallel.TrainInfo) -> None:
        done, loss = int(state.round), float(info.loss)
        self.losses[done - 1] = loss
        self._progress.update(self._task, completed=done, note=f"loss {loss:.3f}")
        console = self._progress.console
        if not console.is_terminal and time.monotonic() - self._printed > _SECONDS_A_LOG_LINE:
            self._printed = time.monotonic()
            console.print(f"Round {done:,} of {len(self.losses):,}: loss {loss:.3f}")


def _snapshot(state: parallel.TrainState, secrets: list[keys.SecretKey], losses: np.ndarray) -> Snapshot:
    words = np.stack([np.frombuffer(secret.to_bytes(), np.uint8) for secret in secrets])
    device = next(iter(state.round.devices()))
    return Snapshot(state, jax.device_put(words, device), jax.device_put(losses, device))


def _fresh(parties: int, ready: _training.Training, start: PyTree) -> Snapshot:
    losses = np.full(ready.rounds, np.nan, np.float32)
    return _snapshot(ready.step.init(start), [keys.new() for _ in range(parties)], losses)


def _keys(secrets: jax.Array) -> list[keys.SecretKey]:
    return [keys.from_bytes(row.tobytes()) for row in np.asarray(secrets)]


def _resumed(
    checkpoints: ocp.training.Checkpointer, fresh: Snapshot, environment: dict[str, Any], console: rich.console.Console
) -> Snapshot:
    """The last checkpoint, with its secrets where its rounds repeat bit for bit, and with fresh ones elsewhere."""
    last = checkpoints.latest
    assert last is not None
    # No values go along: what orbax is given, its errors may show.
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), fresh)
    shot = checkpoints.load(last, shapes)
    before = checkpoints.metadata(last).custom_metadata
    console.print(f"Going on after round {last.step:,}.")
    if before == environment and environment["platform"] == "cpu":
        return shot
    changed = [name for name in environment if not before or before.get(name) != environment[name]]
    reason = f"other {', '.join(changed)}" if changed else "accelerators do not repeat themselves exactly"
    console.print(f"The parties agree new secrets ({reason}): the model may differ in last digits.")
    return shot._replace(secrets=fresh.secrets)


def _environment(train: data.Dataset) -> dict[str, Any]:
    """What the rounds' exact bits depend on besides the configuration."""
    device = parallel.devices(1)[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        "software": f"smark {smark_jax.__version__}, jax {jax.__version__}, jaxlib {jaxlib.__version__}",
        "data": hashlib.sha256(train.images.tobytes() + train.labels.tobytes()).hexdigest(),
    }


# --- The folder ---


@contextlib.contextmanager
def _private_files() -> Iterator[None]:
    """Whatever is written meanwhile, by orbax's threads as well, only its owner may read."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def _alone(private: Path) -> Iterator[None]:
    """Two runs in one folder would use the same secrets; the operating system frees the lock with the process."""
    lock = filelock.FileLock(private / ".lock")
    try:
        with lock.acquire(timeout=0):
            yield
    except filelock.Timeout as error:
        cause = "Wait for it, or choose another folder with --out."
        raise _validate.fail("train", f"{private.parent} to itself", "another smark train at work there", cause) from error


def _same_config(config: _train_config.Config, path: Path, out: Path) -> None:
    if not path.exists():
        with _private_files():
            _write(path, json.dumps(config._asdict(), indent=2) + "\n")
        return
    before = json.loads(path.read_text())
    changed = [f"{name} {before.get(name)!r}" for name, value in config._asdict().items() if before.get(name) != value]
    if changed:
        got = f"one that began with {', '.join(changed)}"
        cause = "Choose another folder with --out, or go on with the configuration it began with."
        raise _validate.fail("train", f"a run of this configuration in {out}", got, cause)


def _start(path: Path, network: Any, seed: int, image_shape: tuple[int, ...]) -> PyTree:
    """The weights that training starts from, which the owner's mark is read against: drawn once, then kept."""
    if not path.exists():
        with _private_files():
            files.write(path, models.init(network, jax.random.key(seed), image_shape))
    return files.nest(files.read(path).leaves)


def _owner_key(path: Path) -> keys.SecretKey:
    if not path.exists():
        with _private_files():
            _write(path, keys.new().to_bytes().hex() + "\n")
    try:
        return keys.from_bytes(bytes.fromhex(path.read_text().strip()))
    except ValueError:  # without its cause, which would show part of the key
        raise _validate.fail("train", f"64 hexadecimal digits in {path}", "something else", "Restore your copy.") from None


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
    except ImportError:
        console.print(f"{path.name} is left out, since it needs matplotlib: pip install 'smark-jax[demo]'")
        return
    figure = Figure(figsize=(8, 4), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    numbers = np.arange(1, len(rounds) + 1)
    axes.plot(numbers, rounds, lw=0.7, color="0.7", label="each round")
    ends = numbers.reshape(len(epochs), -1)[:, -1]
    axes.plot(ends, epochs, "o-", ms=3.5, lw=1.8, color="#1f5f8b", label="mean of an epoch")
    axes.set(xlabel="round", yscale="log", title="Mean loss of the parties, in nats")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
