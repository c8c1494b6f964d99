"""A Flower grid in one process: every client is a ClientApp that is called when its message arrives.

It uses neither sockets nor Ray, so that many rounds of many clients take seconds, and it can make clients fail.
Everything else is Flower's own: messages, contexts, mods, strategies.
"""

import copy
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, Metadata, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from smark_jax import federation

sys.path.insert(0, str(Path(__file__).parent / "app"))
from digits import task  # pyright: ignore[reportMissingImports]


def client_app(config: dict[str, Any]) -> ClientApp:
    """The masked ClientApp of digits, with the configuration of a run that no ``flwr run`` started."""
    app = ClientApp(mods=[federation.masked_mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        index = int(str(context.node_config["partition-id"]))
        round_ = int(str(message.content.config_records["config"]["server-round"]))
        arrays, examples, _ = task.train(message.content.array_records["arrays"], index, round_, config)
        metrics = MetricRecord({"num-examples": examples})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return app


class LocalGrid(Grid):
    """Calls clients in the order of their messages.

    Args:
      app: the ClientApp that all of them run.
      configs: each client's node configuration, by node id.
      fails: ``fails(node_id, message) -> bool``: whether the client dies of this message. Its state is then lost.
      changes: applied to every reply on its way, for tests.
    """

    def __init__(
        self,
        app: ClientApp,
        configs: Mapping[int, dict[str, Any]],
        fails: Callable[[int, Message], bool] = lambda node, message: False,
        changes: Callable[[Message], Message] = lambda reply: reply,
    ) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self._app, self._configs = app, configs
        self._fails, self._changes = fails, changes
        self._contexts = {node: self._context(node) for node in configs}
        self._replies: dict[str, Message] = {}
        self._count = 0
        self.sent: list[Message] = []
        """Every message to a client, in order."""
        self.received: list[Message] = []
        """Every reply, in order."""

    def _context(self, node: int) -> Context:
        return Context(1, node, self._configs[node], RecordDict(), {})

    def set_run(self, run: Any) -> None:
        """There is one run."""

    @property
    def run(self) -> Any:
        return None

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._configs)

    def get_nodes(self) -> Iterable[Any]:
        return []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [self._deliver(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(name) for name in list(message_ids) if name in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _deliver(self, message: Message) -> str:
        self._count += 1
        name, node = str(self._count), message.metadata.dst_node_id
        meta = Metadata(1, name, 1, node, "", "", time.time(), 3600.0, message.metadata.message_type)
        arrived = Message(copy.deepcopy(message.content), metadata=meta)  # pyright: ignore[reportCallIssue]
        self.sent.append(message)
        if self._fails(node, arrived):
            self._contexts[node] = self._context(node)
            reply = Message(Error(0, "the client's process was killed"), reply_to=arrived)
        else:
            try:
                reply = self._app(arrived, self._contexts[node])
            except Exception as error:  # as in Flower, the server sees an error
                reply = Message(Error(0, f"{type(error).__name__}: {error}"), reply_to=arrived)
        self.received.append(reply)
        self._replies[name] = self._changes(reply)
        return name
