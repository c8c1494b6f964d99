"""The server's side: a Flower strategy that wraps another one and shows it nothing but the sum of the updates.

A round takes two exchanges of messages: parties train and send masked words, then reveal the shares that open their
sum. The next round's keys and shares travel in the same messages. The first round, and any round after a failed one,
needs two more exchanges before it. A round in which somebody drops out while training needs one more.
"""

import secrets
import time
from collections.abc import Iterable, Mapping
from logging import ERROR, INFO, WARNING
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from smark_jax import _validate, carriers, codes, embedding, errors, keys
from smark_jax.aggregation import protocol
from smark_jax.aggregation.protocol import messages, server
from smark_jax.federation import task, update, wire
from smark_jax.federation._log import log
from smark_jax.federation.contacts import Contacts
from smark_jax.federation.participants import Fingerprints, participant_mark
from smark_jax.federation.rounds import Round, RoundLog

_POLL_SECONDS = 0.2
_MOST_FAILURES = 3


class Masked(Strategy):
    """Wraps a Flower strategy so that it aggregates a single update: the weighted mean of all masked updates.

    ::

        strategy = federation.Masked(FedAvg(fraction_evaluate=0.0), metrics=("train-loss",))
        strategy.start(grid, initial_arrays=arrays, num_rounds=10, timeout=60)

    Clients add :func:`smark_jax.federation.masked_mod`. Choose ``timeout`` of ``start`` longer than the slowest client
    trains, including the start of its process: a client that has not answered by then drops out of the round.

    Args:
      strategy: samples and configures clients, and applies the mean (FedAvg, FedAdam, ...).
      clip: largest absolute change of a weight in a round. Larger changes are clipped, and their number is logged.
      most_examples: the most training examples that any client may have. A generous value costs precision: the smaller
        a client's share of this number, the coarser its update is encoded.
      metrics: names of training metrics to average under the mask, with values between -16 and 16. Other metrics are
        not sent.
      run_config: the run's configuration, ``context.run_config`` of the ServerApp. Clients get it from Flower,
        and their masks are bound to it.
      quorum: the fewest clients whose sum may be opened; by default more than two thirds of the round's. Clients refuse
        sums over fewer clients than their operators agreed to, which is by default the same number.
      neighbourhood: the neighbourhood of a sparse mask graph, for many clients; see
        :func:`smark_jax.aggregation.neighbourhood`. Clients consent by ``smark-corruption-rate``.
      fingerprints: gives every participant's copy of the global model its own fingerprint.
      bind_model: whether masks cancel only between clients that received the same model, so that a server cannot single
        out a client's update by sending it a different model. By default yes; with fingerprints no, since then all
        models differ by design. So tracing participants requires trusting the server in this respect; clients consent
        by ``smark-bind-model=false``. Everything else that clients are told is always bound.
      exchange_timeout: seconds to wait for answers that need no training.
      federation: a name of at most 31 bytes; a client in several federations asks for it by
        ``smark-federation="..."``.

    Raises:
      SmarkError: when both fingerprints and bind_model are requested.
    """

    def __init__(
        self,
        strategy: FedAvg,
        *,
        clip: float = 2.0,
        most_examples: int = 10_000,
        metrics: Iterable[str] = (),
        run_config: Mapping[str, Any] | None = None,
        quorum: int | None = None,
        neighbourhood: protocol.Neighbourhood | None = None,
        fingerprints: Fingerprints | None = None,
        bind_model: bool | None = None,
        exchange_timeout: float = 60.0,
        federation: str = "",
    ) -> None:
        if fingerprints is not None and bind_model:
            raise _validate.fail(
                "Masked",
                "either fingerprints or bind_model",
                "both",
                "With fingerprints every participant gets a different model, with bind_model all get the same.",
            )
        self.strategy = strategy
        self.fingerprints = fingerprints
        self.results: list[RoundLog] = []
        """The log of each round."""
        self._format = (clip, most_examples, tuple(metrics))
        self._quorum, self._neighbourhood = quorum, neighbourhood
        self._bind_model = fingerprints is None if bind_model is None else bind_model
        self._timeout = exchange_timeout
        self._run_config = dict(run_config or {})
        self._session = federation.encode() + b"/" + secrets.token_bytes(32)
        self._contacts = Contacts(self._session)
        self._last_round = 0
        self._now: Round | None = None
        self._next: Round | None = None
        self._failures = 0
        self._mark: carriers.Mark | None = None

    @property
    def serials(self) -> dict[str, int]:
        """Each participant's serial by its public identity in hexadecimal, in the order of first proof."""
        return self._contacts.serials

    def serial(self, node: int) -> int:
        """The serial of the participant behind one of Flower's node ids.

        Raises:
          KeyError: when the node has not introduced itself, or has dropped out since.
        """
        return self._contacts.serial(node)

    def summary(self) -> None:
        """Logs the settings of both strategies."""
        self.strategy.summary()
        log(INFO, "\t└──> Masked aggregation:")
        log(INFO, "\t\t├── Quorum: %s", self._quorum or "more than 2/3 of the round's clients")
        log(INFO, "\t\t├── Model bound into the masks: %s", "yes" if self._bind_model else "no")
        log(INFO, "\t\t└── Fingerprints in participants' models: %s", "yes" if self.fingerprints else "no")

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Asks the clients of this round to train, and those of the next round for their keys."""
        self._grid, self._before, self._began = grid, arrays, time.monotonic()
        drafts = list(self.strategy.configure_train(server_round, arrays, config, grid))
        nodes = sorted(draft.metadata.dst_node_id for draft in drafts)
        self._greet(nodes)
        self._draw_mark(arrays)
        num_words = self._form(1).num_words(wire.tree(arrays))
        try:
            now = self._prepare(server_round, nodes, num_words)
            content = {**dict(drafts[0].content.items()), self.strategy.arrayrecord_key: arrays}
            now.state, requests = server.close(now.state, self._digest(RecordDict(content), now))
            following = self._begin(server_round + 1, nodes, num_words)
        except protocol.ProtocolError as error:
            self._fail(server_round, error)
            return []
        self._now, self._next = now, following
        out = []
        for node in dict.fromkeys([*(now.nodes[p] for p in requests), *self._next.nodes]):
            content = RecordDict()
            items = wire.Items(setup=self._next.state.setup if node in self._next.nodes else None)
            if node in now.nodes and now.nodes.index(node) in requests:
                content = RecordDict(dict(drafts[0].content.items()))
                content[self.strategy.arrayrecord_key] = self._copy_for(node, arrays)
                request = (now.state.setup.round, requests[now.nodes.index(node)])
                items = items._replace(requests=(request,), format=self._form(len(now.nodes)))
            out.append(Message(wire.put(content, items), dst_node_id=node, message_type=MessageType.TRAIN))
        return out

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Opens the sum with the clients' help, and passes the mean to the wrapped strategy as one reply."""
        now, following = self._now, self._next
        if now is None or following is None:
            return None, None
        self._now = None
        for reply in replies:
            self._take(reply, now, following)
        try:
            now.state, requests = server.close(now.state)
            shares = self._close_quietly(following)
            while now.state.stage != "done":
                asked = {now.nodes[p]: [(now.state.setup.round, request)] for p, request in requests.items()}
                for p, request in shares.items():
                    asked.setdefault(following.nodes[p], []).append((following.state.setup.round, request))
                shares = {}
                for reply in self._exchange({n: wire.Items(requests=tuple(items)) for n, items in asked.items()}):
                    self._take(reply, now, following)
                now.state, requests = server.close(now.state)
            total = server.open_sum(now.state)
            mean = update.decode(total, wire.tree(self._before), len(now.state.survivors), self._form(len(now.nodes)))
        except errors.SmarkError as error:
            self._fail(server_round, error)
            return None, None
        self._failures = 0
        for place in set(range(len(now.nodes))) - set(now.state.survivors):
            self._contacts.forget(now.nodes[place])
        return self._aggregate(server_round, now, mean)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Configures evaluation like the wrapped strategy; with fingerprints, each client evaluates its own copy."""
        drafts = list(self.strategy.configure_evaluate(server_round, arrays, config, grid))
        if self.fingerprints is None:
            return drafts
        self._greet([draft.metadata.dst_node_id for draft in drafts])
        self._draw_mark(arrays)
        out = []
        for draft in drafts:
            node = draft.metadata.dst_node_id
            if node in self._contacts.identities:  # it has proved the identity that this copy would accuse
                content = RecordDict(dict(draft.content.items()))
                content[self.strategy.arrayrecord_key] = self._copy_for(node, arrays)
                out.append(Message(content, dst_node_id=node, message_type=MessageType.EVALUATE))
        return out

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Aggregates evaluation like the wrapped strategy."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def _form(self, num_parties: int) -> update.Format:
        clip, most_examples, metrics = self._format
        inner = self.strategy
        return task.Format(clip, num_parties, most_examples, inner.weighted_by_key, metrics, inner.arrayrecord_key)

    def _digest(self, content: RecordDict, now: Round) -> bytes:
        """The digest of everything that the round's participants act on."""
        form, kind = self._form(len(now.nodes)), MessageType.TRAIN
        run_config, values = self._run_config, now.state.setup.bind_model
        return task.digest(content, form, message_type=kind, run_config=run_config, values=values)

    def _greet(self, nodes: list[int]) -> None:
        """Asks new clients for their identity and a proof of it."""
        strangers = self._contacts.challenges(nodes)
        for reply in self._exchange({n: wire.Items(hello=item) for n, item in strangers.items()}):
            self._contacts.introduce(reply.metadata.src_node_id, self._read(reply).identity)

    def _begin(self, server_round: int, nodes: list[int], num_words: int) -> Round:
        """Starts a round of the protocol under a new number, since clients answer no round twice."""
        nodes = [node for node in nodes if node in self._contacts.identities]
        if not nodes:
            raise protocol.ProtocolError("Masked: no client answered; are SuperNodes running, with masked_mod?")
        roster = [self._contacts.identities[node] for node in nodes]
        self._last_round += 1
        agreed = protocol.setup(
            roster,
            num_words,
            self._last_round,
            session=self._session,
            quorum=self._quorum,
            neighbourhood=self._neighbourhood,
            bind_model=self._bind_model,
        )
        return Round(server.start(agreed), nodes, server_round)

    def _prepare(self, server_round: int, nodes: list[int], num_words: int) -> Round:
        """The round whose keys and shares the last one collected, or a new round set up by two exchanges."""
        ready = self._next
        if ready is not None and ready.state.stage == "shares" and ready.state.setup.num_words == num_words:
            if len(ready.state.shared) >= ready.state.setup.quorum and ready.server_round == server_round:
                return ready
        fresh = self._begin(server_round, nodes, num_words)
        for reply in self._exchange(dict.fromkeys(fresh.nodes, wire.Items(setup=fresh.state.setup))):
            self._take(reply, fresh)
        fresh.state, requests = server.close(fresh.state)
        number = fresh.state.setup.round
        asked = {fresh.nodes[p]: wire.Items(requests=((number, r),)) for p, r in requests.items()}
        for reply in self._exchange(asked):
            self._take(reply, fresh)
        return fresh

    def _exchange(self, asked: Mapping[int, wire.Items]) -> list[Message]:
        """Sends each node its items and waits for the answers; polls more often than Flower's every 3 seconds."""
        if not asked:
            return []
        contents = ((node, wire.put(RecordDict(), items)) for node, items in asked.items())
        out = [Message(c, dst_node_id=node, message_type=MessageType.TRAIN) for node, c in contents]
        waiting, replies = set(self._grid.push_messages(out)), []
        end = time.monotonic() + self._timeout
        while waiting and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
            came = list(self._grid.pull_messages(waiting))
            waiting -= {reply.metadata.reply_to_message_id for reply in came}
            replies += came
        return sorted(replies, key=lambda reply: reply.metadata.src_node_id)

    def _read(self, reply: Message) -> wire.Items:
        if reply.has_error():
            self._contacts.forget(reply.metadata.src_node_id)
            log(WARNING, "Client %s dropped out: %s", reply.metadata.src_node_id, reply.error.reason)
            return wire.Items()
        try:
            return wire.take(reply.content)
        except (ValueError, KeyError) as error:  # our error, or Flower's for a message without content
            log(WARNING, "Client %s sent something else: %s", reply.metadata.src_node_id, error)
            return wire.Items()

    def _take(self, reply: Message, *rounds: Round) -> None:
        """Passes a client's messages to the rounds that wait for them; an invalid message is ignored."""
        for item in self._read(reply).answers:
            for one in rounds:
                node = reply.metadata.src_node_id
                kind = server.stage_of(item)
                if kind != one.state.stage or node not in one.nodes or one.nodes.index(node) != item.party:
                    continue
                try:
                    one.state = server.receive(one.state, item)
                except protocol.ProtocolError as error:
                    log(WARNING, "Client %s is left out of round %s: %s", node, one.state.setup.round, error)

    def _close_quietly(self, following: Round) -> dict[int, messages.Request]:
        """Ends the collection of the next round's keys; without a quorum, that round is set up again later."""
        try:
            following.state, requests = server.close(following.state)
        except protocol.ProtocolError:
            return {}
        return requests

    def _aggregate(
        self, server_round: int, now: Round, mean: update.Mean
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        before = wire.tree(self._before)
        after = {name: before[name].astype(np.float32) + change for name, change in mean.change.items()}
        if mean.clipped:
            log(WARNING, "%s weight changes were clipped in round %s: raise clip", mean.clipped, server_round)
        metrics = MetricRecord({self.strategy.weighted_by_key: mean.examples, **mean.metrics})
        content = RecordDict({self.strategy.arrayrecord_key: wire.record(after, self._before), "metrics": metrics})
        survivors = tuple(now.nodes[p] for p in now.state.survivors)
        seconds = time.monotonic() - self._began
        self.results.append(RoundLog(server_round, survivors, mean.examples, mean.clipped, seconds, ""))
        log(INFO, "Opened the sum of %s clients with %s examples", len(survivors), mean.examples)
        reply = Message(content, dst_node_id=survivors[0], message_type=MessageType.TRAIN)
        return self.strategy.aggregate_train(server_round, [reply])

    def _fail(self, server_round: int, error: Exception) -> None:
        """Records a failed round, which leaves the model unchanged; several in a row end the run."""
        log(ERROR, "Round %s opened nothing: %s", server_round, error)
        self.results.append(RoundLog(server_round, (), 0, 0, time.monotonic() - self._began, str(error)))
        self._now = self._next = None
        self._failures += 1
        if self._failures >= _MOST_FAILURES:
            raise protocol.ProtocolError(f"Masked: {_MOST_FAILURES} rounds in a row opened nothing. The last: {error}")

    def _draw_mark(self, arrays: ArrayRecord) -> None:
        """Draws the mark for copies of this model; which weights can carry depends on the model."""
        if self.fingerprints is not None:
            self._mark = participant_mark(wire.tree(arrays), self.fingerprints)

    def _copy_for(self, node: int, arrays: ArrayRecord) -> ArrayRecord:
        """The model for a node: the global one, or the node's fingerprinted copy."""
        if self.fingerprints is None or self._mark is None:
            return arrays
        params, marks = wire.tree(arrays), self.fingerprints
        word = codes.codebook(keys.derive(marks.key, "code"), [self.serial(node)], marks.num_chips)[0]
        return wire.record(embedding.embed(params, self._mark, word, marks.strength), arrays)
