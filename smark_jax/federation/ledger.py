"""A record of what a participant has answered, kept outside Flower's context so that no stage is answered twice.

Two answers in one round can expose a party: two messages under the same masks, or shares of both of its secrets. A
party's state advances when it answers. But Flower keeps that state in the context of the run: it hands out a copy with
each message, and stores it only after the answer has left. If a copy is used twice, or an old one returns after a
crash, the party would answer twice. So before an answer leaves, the ledger records it on disk, and it refuses a second
one.
"""

import hashlib
import json
from pathlib import Path

from smark_jax import _io
from smark_jax.aggregation.protocol.parameters import refuse

_PATIENCE_SECONDS = 30


def claim(folder: Path, session: bytes, stage: str, round: int) -> None:
    """Records that a stage of a round is being answered.

    Args:
      folder: the ledger of one identity, created if absent. It must never go back in time: do not restore it from a
        backup.
      session: the training run to which the round belongs.
      stage: such as "masked".
      round: the round's number; within a session, the numbers of each stage increase.

    Raises:
      ProtocolError: when this stage of this round, or of a later one, was answered before.
      SmarkError: when the ledger cannot be written; nothing may be answered then.
    """
    path = folder / f"{hashlib.sha256(session).hexdigest()[:32]}.json"
    try:
        with _io.private_files():
            folder.mkdir(exist_ok=True)
        with _io.locked(path.with_suffix(".lock"), seconds=_PATIENCE_SECONDS):
            answered = json.loads(path.read_text()) if path.exists() else {}
            last = answered.get(stage, -1)
            if round <= last:
                cause = "It was repeated, or this participant's state was copied or set back."
                expected = f"a round after {last} at stage {stage!r}, which was answered already"
                raise refuse("ledger", expected, f"round {round}", cause)
            _io.write(path, json.dumps({**answered, stage: round}).encode())
    except (
        OSError,
        json.JSONDecodeError,
        UnicodeDecodeError,
        AttributeError,
        TypeError,
    ) as error:  # the last four: the file is not a ledger
        cause = "Nothing is answered without it: check the folder's free space and permissions."
        raise refuse("ledger", f"to write {folder}", f"{type(error).__name__}: {error}", cause) from None
