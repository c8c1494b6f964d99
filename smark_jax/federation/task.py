"""What a participant is asked to do in a round, and the digest of it to which its masks are bound."""

import hashlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flwr.app import ArrayRecord, RecordDict

from smark_jax.aggregation.protocol.parameters import Setup, pack, refuse


class Format(NamedTuple):
    """How updates are encoded; the strategy sets it and sends it along.

    Attributes:
      clip: largest absolute change of a weight in one round; beyond it, changes are clipped and counted.
      num_parties: participants of the round, and so the most in a sum.
      most_examples: the most training examples that a participant may report.
      weight: name of the metric that counts a participant's training examples.
      metrics: names of the training metrics that are averaged, also under the mask.
      arrays: name of the ArrayRecord that is trained.
    """

    clip: float = 2.0
    num_parties: int = 1
    most_examples: int = 10_000
    weight: str = "num-examples"
    metrics: tuple[str, ...] = ()
    arrays: str = "arrays"

    def num_words(self, arrays: Mapping[str, np.ndarray]) -> int:
        """The words in a message: weights, metrics, the number of clipped weights and the number of examples."""
        return sum(array.size for array in arrays.values()) + len(self.metrics) + 2


class Limits(NamedTuple):
    """The formats that a participant accepts.

    Attributes:
      least_clip: the smallest clip.
      most_clip: the largest clip. With a clip far beyond any change of a weight, all words would be alike.
      weight: the metric that updates may be weighted by. If the server could choose one that is zero for all but one
        participant, the sum would be that participant's update.
    """

    least_clip: float = 1e-4
    most_clip: float = 1e4
    weight: str = "num-examples"

    def check(self, form: Format, setup: Setup) -> None:
        """Refuses a format outside these limits.

        Raises:
          ProtocolError: naming the field and what is allowed.
        """
        n = len(setup.roster)
        sound = {
            f"a clip of {self.least_clip:g} to {self.most_clip:g}": (
                math.isfinite(form.clip) and self.least_clip <= form.clip <= self.most_clip,
                repr(form.clip),
            ),
            f"room for the {n} parties of the roster": (form.num_parties == n, f"for {form.num_parties}"),
            "most_examples of at least 1": (form.most_examples >= 1, str(form.most_examples)),
            f"updates weighted by {self.weight!r}": (form.weight == self.weight, repr(form.weight)),
        }
        for expected, (holds, got) in sound.items():
            if not holds:
                cause = "If the operators agreed to this format, allow it in this participant's node configuration."
                raise refuse("format", expected, got, cause)


def digest(
    content: RecordDict, form: Format, *, message_type: str, run_config: Mapping[str, Any], values: bool = True
) -> bytes:
    """SHA-256 of everything that a participant acts on in a round; server and participant compute the same.

    Args:
      content: the message's content without the protocol's own record; every record counts, by name and in order.
      form: how updates are encoded.
      message_type: Flower's message type, which decides which function of the ClientApp runs.
      run_config: the configuration of the run.
      values: whether the values of arrays count, or only their names, types and shapes.
    """
    sha = hashlib.sha256(pack("smark-jax task v1", message_type, *_fields(dict(run_config)), *_fields(form._asdict())))
    for name, record in content.items():
        sha.update(pack(name, type(record).__name__, len(record)))
        if not isinstance(record, ArrayRecord):
            sha.update(pack(*_fields(dict(record))))
            continue
        for key, array in record.items():
            sha.update(pack(key, array.dtype, array.stype, str(tuple(array.shape)), len(array.data)))
            if values:
                sha.update(array.data)
    return sha.digest()


def _fields(values: Mapping[str, Any]) -> list[str]:
    """Names, types and values, sorted by name; the types keep 1, 1.0, True and "1" distinct."""
    found = []
    for name in sorted(values):
        value = values[name]
        items = list(value) if isinstance(value, list | tuple) else [value]
        found += [name, str(type(value) is list or type(value) is tuple), str(len(items))]
        found += [part for item in items for part in (type(item).__name__, _text(item))]
    return found


def _text(value: Any) -> str:
    if isinstance(value, float):
        return value.hex()
    return value.hex() if isinstance(value, bytes) else str(value)
