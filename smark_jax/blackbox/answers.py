"""Answers that were paid for, in a file that only who holds a key can have written.

A file of answers accuses somebody. So it is JSON with an HMAC-SHA256 over all the rest: what the answers are about, and
of each the probe, the class, and the time at which it came.
"""

import datetime
import hmac
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from smark_jax import _disk, _validate, keys

_FORMAT, _VERSION = "smark answers", 2  # version 1 was not authenticated
_LARGEST_FILE = 1 << 26


class Answer(NamedTuple):
    """One answer: the SHA-256 of the probe's pixels, the class number, and when it came (UTC, ISO 8601)."""

    probe: str
    label: int
    time: str


class Answers(NamedTuple):
    """Where answers are kept.

    Attributes:
      path: of the file; made with the first answers.
      key: authenticates it. Take one for this purpose only: ``keys.derive(master, "my-model", "answers")``.
      about: whom and what the answers are from, of what JSON holds; a file about anything else is refused.
    """

    path: Path
    key: keys.SecretKey
    about: Mapping[str, Any] = {}


def read(kept: Answers) -> list[Answer]:
    """The answers in the file, in the order in which they came; none where there is no file.

    Raises:
      ValueError: when the file was not written with this key, was changed since, or is about something else.
    """
    if not kept.path.exists():
        return []
    expected = f"answers that were kept in {kept.path} under this key"
    cause = "Its answers cannot be trusted, so none of them counts: move it away, and ask again (smark query --fresh)."
    if kept.path.stat().st_size > _LARGEST_FILE:
        raise _validate.fail("query", expected, f"a file of more than {_LARGEST_FILE:,} bytes", cause)
    try:
        document = json.loads(kept.path.read_bytes())
        mac = bytes.fromhex(document.pop("mac"))
    except (KeyError, TypeError, AttributeError, RecursionError, ValueError):
        raise _validate.fail("query", expected, "one without authentication", cause) from None
    if not hmac.compare_digest(mac, _mac(kept.key, document)):
        raise _validate.fail("query", expected, "one that somebody else wrote or changed", cause)
    if document["about"] != dict(kept.about):
        got = f"some about {document['about']}"
        raise _validate.fail("query", f"answers about {dict(kept.about)} in {kept.path}", got, "Name another file.")
    return [Answer(*row) for row in document["answers"]]


def write(kept: Answers, answers: Sequence[Answer]) -> None:
    """Writes all answers, whole or not at all, readable for their owner only."""
    document = {"format": _FORMAT, "version": _VERSION, "about": dict(kept.about), "answers": [list(a) for a in answers]}
    content = json.dumps({**document, "mac": _mac(kept.key, document).hex()}).encode()
    with _disk.private_files(), _disk.whole_file(kept.path) as file:
        file.write(content)


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _mac(key: keys.SecretKey, document: Mapping[str, Any]) -> bytes:
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    return hmac.digest(key.to_bytes(), canonical, "sha256")
