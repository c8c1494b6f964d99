"""A resumable training in its own folder: trains a base model across parties under masks.

The subfolder ``private`` must never leave the owner. It holds the key of the owner's mark, the weights relative to
which the mark is read, and the last checkpoint, with the parties' secrets and the optimiser's state, which also holds
the mark.
"""

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from smark_jax import _documents, _io, _validate, data, errors, files, keys, parallel
from smark_jax._types import ApplyFn, PyTree
from smark_jax.training import checkpoints, recipe

OUTPUTS = ("base.safetensors", "results.json", "training.png")


class Task(NamedTuple):
    """The network and the data of a training.

    Attributes:
      init: draws the network's initial weights.
      apply_fn: pure ``apply_fn(params, images) -> logits``.
      train: the parties' examples, before they are dealt.
      accuracy: of params on held-out examples.
    """

    init: Callable[[], PyTree]
    apply_fn: ApplyFn
    train: data.Dataset
    accuracy: Callable[[PyTree], float]


class Results(NamedTuple):
    """What a training came to: the content of ``results.json``.

    Attributes:
      config: the settings that define the training.
      base_sha256: hash of the base's leaves.
      file_sha256: SHA-256 of ``base.safetensors``.
      accuracy: on held-out examples.
      loss: the mean of each epoch, in nats; null where it is not finite.
      rounds: how many there were.
      owner_mark_log10_p: how improbable the reading of the owner's mark is by chance; null without a mark.
      owner_key_commitment: the published commitment to the owner's key; null without a mark.
      devices: that the parties ran on.
      seconds: that the last, perhaps resumed, run took.
    """

    config: dict[str, object]
    base_sha256: _documents.Hash
    file_sha256: _documents.Hash
    accuracy: float
    loss: tuple[float | None, ...]
    rounds: int
    owner_mark_log10_p: float | None
    owner_key_commitment: _documents.Hash | None
    devices: tuple[str, ...]
    seconds: float


def run(
    out: Path,
    settings: Mapping[str, Any],
    how: recipe.Recipe,
    load: Callable[[], Task],
    *,
    owner_mark: bool = True,
    checkpoint_every: int = 100,
    on_progress: checkpoints.OnProgress = lambda done, total, loss: None,
    say: Callable[[str], None] = lambda text: None,
) -> Results:
    """Starts or resumes a training; writes ``base.safetensors``, ``results.json`` and ``training.png``.

    Args:
      out: the run's folder; made if absent.
      settings: all settings that define this training, as JSON values: a folder can only be resumed with the same ones.
      how: parties, epochs, batches, learning rate, clip, seed.
      load: loads the task; called only if something is left to do.
      owner_mark: whether to embed the owner's own mark in the base during training.
      checkpoint_every: rounds between checkpoints.
      on_progress: called before the first round and after each.
      say: called with sentences about the progress.

    Returns:
      The content of ``results.json``.

    Raises:
      SmarkError: when ``out`` holds a run with other settings or unrelated files, or another process is at work there.
    """
    began = time.perf_counter()
    private = out / "private"
    _refuse_others_files(private, out)
    out.mkdir(parents=True, exist_ok=True)
    private.mkdir(mode=0o700, exist_ok=True)
    with _alone(private):
        _same_settings(settings, private / "config.json", out)
        if (out / "results.json").exists():
            say(f"{out} holds this model already; nothing is left to do.")
            shutil.rmtree(private / "checkpoints", ignore_errors=True)
            (out / "base.safetensors").chmod(0o600)  # earlier versions left it readable by everybody
            return _results(out / "results.json")
        task = load()
        start = _start(private / "start.safetensors", task.init)
        key = _owner_key(private / "owner.key") if owner_mark else None
        owner = recipe.owner_mark(start, key) if key else None
        ready = recipe.prepare(how, task.apply_fn, task.train, owner)
        params, round_losses = checkpoints.fit(
            ready,
            start,
            private / "checkpoints",
            every=checkpoint_every,
            environment=checkpoints.environment_of(task.train, how.parties),
            on_progress=on_progress,
            say=say,
        )
        with _io.private_files():
            digest = files.write(out / "base.safetensors", params)
        epochs = np.asarray(round_losses).reshape(how.epochs, -1).mean(axis=1)
        _picture(out / "training.png", round_losses, epochs, say)
        results = Results(
            config=dict(settings),
            base_sha256=files.content_hash(files.flatten(params)),
            file_sha256=digest,
            accuracy=task.accuracy(params),
            loss=tuple(round(float(loss), 6) if math.isfinite(loss) else None for loss in epochs),
            rounds=ready.rounds,
            owner_mark_log10_p=recipe.owner_log10_p(params, owner) if owner else None,
            owner_key_commitment=keys.commitment(key) if key else None,
            devices=tuple(str(device) for device in parallel.devices(how.parties)),
            seconds=round(time.perf_counter() - began, 1),
        )
        _io.write(out / "results.json", _documents.pretty(results))
        shutil.rmtree(private / "checkpoints")
        return results


@contextlib.contextmanager
def _alone(private: Path) -> Iterator[None]:
    """Locks the folder, since two runs in one folder would use the same secrets."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(_io.locked(private / ".lock"))
        except TimeoutError as error:
            cause = "Wait for it, or choose another folder."
            raise _validate.fail(
                "train", f"{private.parent} to itself", "another smark train at work there", cause, kind=errors.InUse
            ) from error
        yield


def _refuse_others_files(private: Path, out: Path) -> None:
    """Refuses a folder with unrelated files, so that a run overwrites only its own."""
    there = [name for name in OUTPUTS if (out / name).exists()]
    if there and not (private / "config.json").exists():
        cause = "Choose another folder, or move them."
        raise _validate.fail("train", f"a new folder, or that of a run, in {out}", f"{', '.join(there)} there", cause)


def _same_settings(settings: Mapping[str, Any], path: Path, out: Path) -> None:
    if not path.exists():
        _io.write(path, _documents.pretty(settings), private=True)
        return
    before = _json(path)
    changed = [f"{name} {before.get(name)!r}" for name, value in settings.items() if before.get(name) != value]
    if changed:
        got = f"one that began with {', '.join(changed)}"
        cause = "Choose another folder, or go on with the configuration it began with."
        raise _validate.fail("train", f"a run of this configuration in {out}", got, cause)


def _results(path: Path) -> Results:
    """The results that an earlier run of the same training wrote."""
    try:
        return _documents.parse(Results, _json(path))
    except _documents.Wrong as error:
        cause = "Was it changed by hand, or written by a newer smark-jax? Upgrade it, or train into another folder."
        raise _validate.fail("train", f"the results of smark train in {path}", f"some whose {error}", cause) from None


def _json(path: Path) -> dict[str, object]:
    """An object that an earlier run of the same training wrote."""
    try:  # versions before wrote NaN, which is no JSON, where training had diverged
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: None)
    except ValueError as error:  # of JSON, or of UTF-8
        cause = "Was it changed? Restore it from a backup, or train into another folder."
        raise _validate.fail("train", f"what smark train wrote in {path}", str(error), cause) from error
    if not isinstance(found, dict):
        raise _validate.fail("train", f"an object in {path}", type(found).__name__, "Was it changed by hand?")
    return found


def _start(path: Path, init: Callable[[], PyTree]) -> PyTree:
    """The weights that training starts from, drawn once and kept: the owner's mark is read relative to them."""
    if not path.exists():
        with _io.private_files():
            files.write(path, init())
    return files.nest(files.read(path).leaves)


def _owner_key(path: Path) -> keys.SecretKey:
    if not path.exists():
        _io.write(path, f"{keys.new().to_bytes().hex()}\n".encode(), private=True)
    try:
        return keys.from_bytes(bytes.fromhex(path.read_text().strip()))
    except ValueError:  # raised without its cause, which would show part of the key
        raise _validate.fail(
            "train", f"64 hexadecimal digits in {path}", "something else", "Restore your copy."
        ) from None


def _picture(path: Path, rounds: np.ndarray, epochs: np.ndarray, say: Callable[[str], None]) -> None:
    """The training curve: every round's loss, and each epoch's mean."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogFormatter
    except ImportError:
        say(f"{path.name} is left out, since it needs matplotlib: pip install 'smark-jax[train]'")
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
    axes.yaxis.set_minor_formatter(LogFormatter())  # it omits labels where there is no room for all
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
