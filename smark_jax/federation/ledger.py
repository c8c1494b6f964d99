"""What a participant has answered already, kept outside of Flower's context: no stage of a round is answered twice.

Two answers about one round can open a party: its words under the same masks, or shares of both of its secrets. A
party's state moves on when it answers, but that state lies in the context of the run, which Flower hands out as a copy
with each message and stores again after the answer has left. A copy that is used twice, or an old one that comes back
after a crash, would answer twice. So before an answer leaves, the ledger takes note of it on the disk, and refuses a
second one.
"""

import hashlib
import json
from pathlib import Path

from smark_jax import _io
from smark_jax.aggregation.protocol.parameters import refuse

_PATIENCE_SECONDS = 30


def claim(folder: Path, session: bytes, stage: str, round: int) -> None:
    """Takes note that a stage of a round is answered now.

    Args:
      folder: the ledger of one identity. It is made when it is not there, and never goes back: do not restore it from
        a backup.
      session: the training run that the round is of.
      stage: such as "masked".
      round: its number; within a session each stage's numbers grow.

    Raises:
      ProtocolError: when this stage of this round, or of a later one, was answered before.
      SmarkError: when the ledger cannot be written: nothing may be answered then.
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
    except (OSError, json.JSONDecodeError, AttributeError, TypeError) as error:  # the last: no ledger
        cause = "Without it nothing is answered: see to space and permissions of the folder."
        raise refuse("ledger", f"to write {folder}", f"{type(error).__name__}: {error}", cause) from None
