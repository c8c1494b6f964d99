"""Querying a suspect with probes, and keeping its answers in a sealed file that only the key's holder can write.

Answers can lead to an accusation, so their file is sealed (:func:`smark_jax.keys.seal`). It states what the answers are
about, and for each answer the probe, the class, and the time.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cryptography.exceptions import InvalidTag
from jaxtyping import Float, UInt8

from smark_jax import _documents, _io, _validate, keys
from smark_jax._types import AnyArray
from smark_jax.blackbox.probes import halves

_FORMAT, _VERSION = "smark answers", 2  # version 1 was not authenticated
_LARGEST_FILE = 1 << 26
SEALED = b"smark sealed v1\n"
"""The first bytes of a sealed file."""

Predict = Callable[[np.ndarray], Any]
"""Maps images, uint8 [B, H, W, C], to class numbers [B], or to scores [B, classes], of which the largest counts."""


class Answer(NamedTuple):
    """One answer: the SHA-256 of the probe's pixels, the class number, and when it came (UTC, ISO 8601)."""

    probe: str
    label: int
    time: str


class _File(NamedTuple):
    """The content of a file of answers."""

    format: str
    version: int
    about: dict[str, object]
    answers: tuple[tuple[str, int, str], ...]


class Answers(NamedTuple):
    """Where answers are kept.

    Attributes:
      path: of the file, which is created with the first answers.
      key: seals the file. Use one for this purpose only: ``keys.derive(master, "my-model", "answers")``.
      about: whose answers to which probes these are, as JSON values; a file about anything else is refused.
    """

    path: Path
    key: keys.SecretKey
    about: Mapping[str, object] = {}


def read(kept: Answers) -> list[Answer]:
    """The answers in the file, oldest first; none where there is no file.

    Raises:
      SmarkError: when the file was not written with this key, was changed later, or is about something else.
    """
    if not kept.path.exists():
        return []
    expected = f"answers that were kept in {kept.path} under this key"
    cause = "Its answers cannot be trusted, so none of them counts: move it away, and ask again (smark query --fresh)."
    if kept.path.stat().st_size > _LARGEST_FILE:
        raise _validate.fail("query", expected, f"a file of more than {_LARGEST_FILE:,} bytes", cause)
    content = kept.path.read_bytes()
    if not content.startswith(SEALED):
        raise _validate.fail("query", expected, "one without authentication", cause)
    try:
        found = _documents.parse(_File, json.loads(unseal(kept.key, content)))
    except InvalidTag:
        raise _validate.fail("query", expected, "one that somebody else wrote or changed", cause) from None
    except _documents.Wrong as error:
        raise _validate.fail("query", expected, f"some whose {error}", "Upgrade smark-jax.") from None
    if found.about != dict(kept.about):
        got = f"some about {found.about}"
        raise _validate.fail("query", f"answers about {dict(kept.about)} in {kept.path}", got, "Name another file.")
    return [Answer(*row) for row in found.answers]


def write(kept: Answers, answers: Sequence[Answer]) -> None:
    """Writes all answers atomically to a file that only its owner can read."""
    document = _File(_FORMAT, _VERSION, dict(kept.about), tuple((a.probe, a.label, a.time) for a in answers))
    content = json.dumps(_documents.plain(document)).encode()
    _io.write(kept.path, seal(kept.key, content), private=True)


def seal(key: keys.SecretKey, content: bytes) -> bytes:
    """Seals a file's content: answers reveal a codeword, and probes let anyone ask for one."""
    return SEALED + keys.seal(keys.derive(key, "seal"), content, SEALED)


def unseal(key: keys.SecretKey, sealed: bytes) -> bytes:
    """The content that was passed to :func:`seal`.

    Raises:
      InvalidTag: when it was sealed with another key, or changed.
    """
    return keys.unseal(keys.derive(key, "seal"), sealed.removeprefix(SEALED), SEALED)


# Asking


def digests(probe_images: UInt8[AnyArray, "m H W C"]) -> list[str]:
    """The identifier of each probe in a file of answers: the SHA-256 of its pixels, in hex."""
    return [hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest() for image in np.asarray(probe_images)]


def query(
    predict: Predict,
    probe_images: UInt8[AnyArray, "m H W C"],
    num_classes: int,
    *,
    repeats: int = 1,
    batch_size: int = 64,
    answers: Answers | None = None,
    on_answer: Callable[[int], None] = lambda count: None,
) -> Float[np.ndarray, " m"]:
    """Asks a suspect about every probe and reads the answers as chips.

    Args:
      predict: the suspect.
      probe_images: all or some of those that :func:`smark_jax.blackbox.probes` made, shape [m, H, W, C].
      num_classes: of the suspect, the same as of the base.
      repeats: how often each probe is asked; use more than one where answers are not deterministic.
      batch_size: probes per call.
      answers: where answers are kept; a query that failed half-way resumes from them, so that none is paid for twice.
      on_answer: called with the number of answers after each call, for a progress bar.

    Returns:
      Chips, shape [m]: the mean over repeats of +1 for an answer inside the probe's half and -1 outside.

    Raises:
      SmarkError: when answers are not one class number (or one row of scores) for each image, a class is out of range,
        or as :func:`smark_jax.blackbox.answers.read`.
    """
    for name, value in (("repeats", repeats), ("batch_size", batch_size)):
        _validate.positive("query", name, value)
    images = np.asarray(probe_images)
    sides, names = halves(images, num_classes), digests(images)
    found = read(answers) if answers else []
    had: dict[str, list[int]] = {name: [] for name in names}
    for answer in found:
        had.setdefault(answer.probe, []).append(answer.label)
    rounds = [[i for i, name in enumerate(names) if len(had[name]) <= turn] for turn in range(repeats)]
    wanted = [i for some in rounds for i in some]
    done = len(images) * repeats - len(wanted)
    for start in range(0, len(wanted), batch_size):
        some = wanted[start : start + batch_size]
        labels = ask(predict, images[some], num_classes)
        found += [Answer(names[i], label, _documents.now()) for i, label in zip(some, labels, strict=True)]
        for i, label in zip(some, labels, strict=True):
            had[names[i]].append(label)
        if answers:
            write(answers, found)
        on_answer(done + start + len(some))
    asked = np.array([had[name][:repeats] for name in names])
    _in_range(asked, num_classes)
    return np.take_along_axis(sides, asked, axis=1).mean(axis=1, dtype=np.float64)


def ask(predict: Predict, images: UInt8[np.ndarray, "B H W C"], num_classes: int) -> list[int]:
    """Calls a suspect once and checks its answers.

    Raises:
      SmarkError: when they are not one class number (or one row of scores) for each image, or a class is out of range.
    """
    return _labels(predict(images), len(images), num_classes)


def _labels(found: Any, count: int, num_classes: int) -> list[int]:
    found = np.asarray(found)
    if found.shape == (count, num_classes) and np.issubdtype(found.dtype, np.floating):
        found = found.argmax(axis=1)
    if found.shape != (count,) or not np.issubdtype(found.dtype, np.integer):
        expected = f"class numbers of shape ({count},), or scores of shape ({count}, {num_classes})"
        got = f"shape {found.shape}, dtype {found.dtype}"
        cause = "Does predict take a batch of images?"
        desk = f"The suspect has to answer with one class number for each image; it was asked about {count}."
        raise _validate.fail("query: predict", expected, got, cause, desk=desk)
    _in_range(found, num_classes)
    return found.tolist()


def _in_range(labels: np.ndarray, num_classes: int) -> None:
    if labels.min() < 0 or labels.max() >= num_classes:
        got = f"{labels.min()} to {labels.max()}"
        raise _validate.fail("query: predict", f"classes of 0 to {num_classes - 1}", got, "Does it count from 1?")
