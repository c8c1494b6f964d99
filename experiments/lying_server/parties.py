"""Honest participants of Flower's own classes, as seen by a server that controls the network."""

import contextlib
import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, Metadata, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from smark_jax import federation
from smark_jax.federation import identities, update, wire

NODES = (100, 101, 102, 103)
VICTIM = 0
WEIGHTS = 48
_DEAD = 1e3
"""A model whose first weight is this large gives no gradient, as one with dead units does."""


class Answer(NamedTuple):
    """What came back from a participant.

    Attributes:
      items: protocol objects; none for an error.
      error: the exception, or None.
      words: the update's words before masking, which only the judge sees; None where nothing was trained.
      update: the update itself, likewise.
      seconds: how much processor time it took.
    """

    items: wire.Items
    error: Exception | None
    words: np.ndarray | None
    update: np.ndarray | None
    seconds: float


def model() -> ArrayRecord:
    return ArrayRecord({"w": Array(np.linspace(-1, 1, WEIGHTS, dtype=np.float32))})


def content() -> RecordDict:
    """What an honest server has everybody train on."""
    return RecordDict({"arrays": model(), "config": ConfigRecord({"learning-rate": 1.0, "server-round": 1})})


def message(party: int, sent: RecordDict, kind: str = "train") -> Message:
    """A message as it arrives at a participant."""
    meta = Metadata(1, "1", 1, NODES[party], "", "", time.time(), 3600.0, kind)
    return Message(copy.deepcopy(sent), metadata=meta)  # pyright: ignore[reportCallIssue]


def _app(updates: np.ndarray) -> ClientApp:
    app = ClientApp(mods=[federation.masked_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = int(str(context.node_config["partition-id"]))
        given = message.content.array_records["arrays"]["w"].numpy()
        rate = float(str(message.content.config_records["config"]["learning-rate"]))
        moved = updates[number] * rate * (abs(given.reshape(-1)[0]) < _DEAD)
        arrays = ArrayRecord({"w": Array((given + moved).astype(given.dtype))})
        metrics = MetricRecord({"num-examples": 10, "victim": float(number == VICTIM)})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    app.train("other")(train)
    return app


class Parties:
    """Four participants with identity files and a roster, on conditions of their own.

    Args:
      folder: for identities and ledgers.
      agreed: options of all node configurations besides these files, such as ``{"smark-least-parties": 1}``; None
        leaves an option out.
    """

    def __init__(self, folder: Path, agreed: dict[str, Any] | None = None) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{node}.identity" for node in NODES]
        self.roster = tuple(identities.create(path) for path in paths)
        listed = folder / "roster.txt"
        listed.write_text("".join(f"{identity.hex()}\n" for identity in self.roster))
        files = [{"smark-identity": str(path), "smark-roster": str(listed)} for path in paths]
        self._configs = [
            {
                name: value
                for name, value in ({"partition-id": number} | file | (agreed or {})).items()
                if value is not None
            }
            for number, file in enumerate(files)
        ]
        self.begin(0)

    def begin(self, seed: int) -> None:
        """A new run: no context is left, and other data."""
        self._updates = np.random.default_rng([seed, 1]).normal(0, 0.1, (len(NODES), WEIGHTS)).astype(np.float32)
        self.app = _app(self._updates)
        self.contexts = [
            Context(1, node, config, RecordDict(), {}) for node, config in zip(NODES, self._configs, strict=True)
        ]

    def copy_of(self, party: int) -> Context:
        """What Flower has stored of a participant: it may be handed out again."""
        return copy.deepcopy(self.contexts[party])

    def deliver(self, party: int, sent: RecordDict, kind: str = "train", context: Context | None = None) -> Answer:
        """Hands a message to a participant, with the context that is stored or with an old copy of it."""
        context = self.contexts[party] if context is None else context
        encoded: list[np.ndarray] = []
        began = time.process_time()
        try:
            with _recorded(encoded):
                reply = self.app(message(party, sent, kind), context)
            items, error = wire.take(reply.content), None
        except Exception as raised:  # Flower would send its text; the judge decides which types are allowed
            items, error = wire.Items(), raised
        words = encoded[-1] if encoded else None
        return Answer(items, error, words, self._updates[party], time.process_time() - began)


@contextlib.contextmanager
def _recorded(into: list[np.ndarray]) -> Iterator[None]:
    encode = update.encode

    def recording(*args: Any) -> np.ndarray:
        words = encode(*args)
        into.append(words.copy())
        return words

    with mock.patch.object(update, "encode", recording):
        yield
