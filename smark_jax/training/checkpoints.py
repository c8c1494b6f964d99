"""Interruptible training: checkpoints, and the secrets that a resumed run may reuse.

A checkpoint holds the parties' secrets, since the rounding of a round depends on them: with fresh secrets a resumed run
would not reach the same model. Two messages under one mask would reveal their difference, so the rounds after a
checkpoint are sent again only where they repeat bit for bit: on CPU devices, with the same processor, software and
data. Otherwise the parties agree new secrets. After each checkpoint every secret is replaced by one derived from it:
an attacker who obtains the folder later cannot open any round before the checkpoint.
"""

import contextlib
import hashlib
import importlib.metadata
import itertools
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from smark_jax import _io, _validate, aggregation, data, keys, parallel
from smark_jax._types import PyTree
from smark_jax.training import rounds
from smark_jax.training.recipe import Training

OnProgress = Callable[[int, int, float], None]
"""Called with the rounds done, the total number of rounds, and the last round's mean loss (NaN before the first)."""

_SHOWN = 6
_SOFTWARE = ("smark-jax", "jax", "jaxlib", "flax", "optax", "numpy", "ml_dtypes")
_VARIABLES = (
    "XLA_",
    "LIBTPU_",
    "TPU_",
    "TF_",
    "CUDA_",
    "CUDNN_",
    "CUBLAS_",
    "NVIDIA_",
    "HIP_",
    "OMP_",
    "MKL_",
    "ONEDNN_",
)


class _Snapshot(NamedTuple):
    """The content of a checkpoint, apart from the environment in its metadata.

    Attributes:
      state: of the training.
      secrets: the parties' secrets for the rounds from this one on, shape [P, 32].
      losses: of the rounds so far; NaN for the others, shape [rounds].
    """

    state: parallel.TrainState
    secrets: jax.Array
    losses: jax.Array


def fit(
    ready: Training,
    start: PyTree,
    folder: Path,
    *,
    every: int,
    environment: dict[str, str],
    on_progress: OnProgress = lambda done, total, loss: None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[PyTree, np.ndarray]:
    """Runs all rounds, or those after the last checkpoint in ``folder``.

    Args:
      ready: the training, from :func:`smark_jax.training.prepare`.
      start: the params that it starts from.
      folder: of the checkpoints; the caller removes it once the result is safe.
      every: rounds between checkpoints.
      environment: from :func:`environment_of`; if it differs from the checkpoint's, the parties agree new secrets.
      on_progress: called before the first round and after each.
      say: called with a sentence when a run resumes, or when its parties agree new secrets.

    Returns:
      The params, and each round's mean loss, shape [rounds].

    Raises:
      SmarkError: when parties' gradients are NaN or infinite.
    """
    with _validate.needs("train", "train"):
        from orbax.checkpoint import v1 as ocp
    latest: Any = ocp.training.preservation_policies.LatestN(1)  # whose type orbax 0.12 states too narrowly
    with (
        _io.private_files(),
        ocp.training.Checkpointer(
            str(folder.resolve()), preservation_policy=latest, cleanup_tmp_directories=True
        ) as checkpoints,
    ):
        shot = _fresh(ready, start)
        first = 0 if checkpoints.latest is None else checkpoints.latest.step
        if checkpoints.latest is None:
            checkpoints.save(0, shot, custom_metadata=environment)
        else:
            shot = _resumed(checkpoints, shot, environment, say)
        losses = np.array(shot.losses)

        def on_round(state: parallel.TrainState, info: parallel.TrainInfo) -> None:
            done, loss = int(state.round), float(info.loss)
            losses[done - 1] = loss
            on_progress(done, ready.rounds, loss)

        on_progress(first, ready.rounds, float("nan"))
        state, secrets, batches = shot.state, _keys(shot.secrets), ready.batches(first)
        for begin in range(first, ready.rounds, every):
            stretch = itertools.islice(batches, every)
            state = rounds.fit(ready.step, state, stretch, aggregation.pair_keys(secrets), on_round)
            secrets = [keys.derive(secret, "next stretch") for secret in secrets]
            if begin + every < ready.rounds:
                checkpoints.save(begin + every, _snapshot(state, secrets, losses), custom_metadata=environment)
    return state.params, losses


def _snapshot(state: parallel.TrainState, secrets: list[keys.SecretKey], losses: np.ndarray) -> _Snapshot:
    words = np.stack([np.frombuffer(secret.to_bytes(), np.uint8) for secret in secrets])
    device = next(iter(state.round.devices()))
    return _Snapshot(state, jax.device_put(words, device), jax.device_put(losses, device))


def _fresh(ready: Training, start: PyTree) -> _Snapshot:
    losses = np.full(ready.rounds, np.nan, np.float32)
    return _snapshot(ready.step.init(start), [keys.new() for _ in range(ready.parties)], losses)


def _keys(secrets: jax.Array) -> list[keys.SecretKey]:
    return [keys.from_bytes(row.tobytes()) for row in np.asarray(secrets)]


def _resumed(checkpoints: Any, fresh: _Snapshot, environment: dict[str, str], say: Callable[[str], None]) -> _Snapshot:
    """The last checkpoint, with its secrets where its rounds repeat bit for bit, and with fresh ones elsewhere."""
    last = checkpoints.latest
    assert last is not None
    # Only shapes are passed, no values, since orbax may show in its errors what it was given.
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), fresh)
    shot = checkpoints.load(last, shapes)
    before = checkpoints.metadata(last).custom_metadata
    say(f"Going on after round {last.step:,}.")
    if before == environment and environment["platform"] == "cpu":
        return shot
    known = before if isinstance(before, dict) else {}
    changed = [
        f"{name} is {environment.get(name, 'not set')}, was {known.get(name, 'not recorded')}"
        for name in sorted(environment.keys() | known.keys())
        if known.get(name) != environment.get(name)
    ]
    reason = "; ".join(changed[:_SHOWN]) + (f"; and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else "")
    reason = reason or "results on accelerators do not repeat exactly"
    say(f"The parties agree new secrets ({reason}): the model may differ in last digits.")
    if changed:
        say(
            "For the same model bit for bit, stop this run before its next checkpoint, restore that, and go on.",
        )
    return shot._replace(secrets=fresh.secrets)


def environment_of(train: data.Dataset, parties: int) -> dict[str, str]:
    """Everything besides the configuration on which the rounds' exact bits depend: one text for each name.

    These are versions, JAX's settings (from the environment or from code), and variables that XLA and the libraries
    below it read. When in doubt, a setting is included: a needless difference only costs the last digits, but an
    overlooked one costs the secrecy of a round.
    """
    device = parallel.devices(parties)[0]
    settings = {name: str(value) for name, value in jax.config.values.items() if _matters(name)}
    variables = {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES) and _matters(name)}
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "processor": _processor(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _SOFTWARE},
        **settings,
        **variables,
        "data": hashlib.sha256(train.images.tobytes() + train.labels.tobytes()).hexdigest(),
    }


def _matters(name: str) -> bool:
    """Whether a setting can change results; cache folders and logging cannot."""
    return not any(word in name.lower() for word in ("cache", "log", "dump", "traceback", "pprint", "address"))


def _processor() -> str:
    """The kind of processor, for which XLA generates specific code, and how many processors share the work."""
    number = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kind = f"{platform.machine()} {platform.processor()}"
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
        told = [line for line in lines if line.startswith(("model name", "flags", "CPU part", "Features"))]
        kind += f" {hashlib.sha256(repr(told).encode()).hexdigest()[:16]}"
    return f"{number} x {kind}"
