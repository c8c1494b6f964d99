"""A server that lies: it runs one round with honest participants, and records all their answers.

It follows the protocol as far as its own lies allow, without any of an honest server's checks; the judge decides what
it can open. Some lies are planned (a roster of one, a quorum of one, a different format, configuration or model for
everybody but the victim, a decoy, the same question twice); others alter any field of any message, drop or repeat it.
"""

from typing import Any, NamedTuple

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, RecordDict

from experiments.lying_server.judge import Heard
from experiments.lying_server.lies import alter, alter_content
from experiments.lying_server.parties import NODES, VICTIM, WEIGHTS, Answer, Parties, content, model
from smark_jax import keys
from smark_jax.aggregation import protocol
from smark_jax.aggregation.protocol import Setup, messages
from smark_jax.aggregation.protocol import party as sybils
from smark_jax.federation import task, wire

PLANS = (
    "honest",
    "roster of one",
    "quorum of one",
    "sparse graph",
    "invented parties",
    "unbound model",
    "format",
    "weight",
    "configuration",
    "dead models",
    "decoy",
    "function",
    "two questions",
    "old state",
    "random setup",
)
"""What a server has in mind; every one of them besides random lies, in some of the trials."""

_EVERYBODY = range(len(NODES))


class Plan(NamedTuple):
    """What the server does in a round.

    Attributes:
      name: one of PLANS.
      rate: with what probability each message is altered, dropped or repeated besides.
      alone: whether it goes on with the victim alone wherever it may.
    """

    name: str
    rate: float
    alone: bool


class LyingServer:
    """One round.

    Args:
      parties: whom it lies to.
      plan: what it has in mind.
      rng: of its random lies.
    """

    def __init__(self, parties: Parties, plan: Plan, rng: np.random.Generator) -> None:
        self.parties, self.plan, self._rng = parties, plan, rng
        self.answers: list[Answer] = []
        """Everything that came back."""
        self._copies: dict[int, Context] = {}
        self._sybils: dict[int, Any] = {}
        self._replays: list[tuple[int, RecordDict, str]] = []
        self._clip = float(rng.choice([1e30, 1e4]))  # one value that participants refuse, and one that they accept
        self._invented: dict[int, keys.SecretKey] = {}
        setup = self._setup()
        self._heard = Heard(setup, {}, [], [], frozenset(self._invented))

    def play(self) -> Heard:
        """The round, to the end or as far as anybody answers."""
        heard = self._heard
        for party in _EVERYBODY:
            challenge = messages.Challenge(heard.setup.session, keys.new().to_bytes())
            self._ask(party, wire.put(RecordDict(), wire.Items(hello=challenge)))
        for party in self._asked():
            for answer in self._ask(party, wire.put(RecordDict(), wire.Items(setup=heard.setup))):
                self._note(answer, "keys", heard.advertised)
        self._join_sybils()
        if heard.advertised:
            self._shares_and_words()
        for party, sent, kind in self._replays:
            self._hear(self.parties.deliver(party, sent, kind))
        return heard

    def _shares_and_words(self) -> None:
        heard, shared = self._heard, {}
        for party in self._asked():
            for answer in self._request(party, messages.ShareRequest(heard.advertised)):
                self._note(answer, "shares", shared)
        self._share_sybils(shared)
        members = tuple(sorted(shared))
        agreed: dict[int, bytes] = {}
        for party in self._asked():
            sealed = {v: shared[v].sealed[party] for v in members if party in shared[v].sealed}
            for answer in self._request(party, messages.MaskRequest(members, sealed), self._task_of(party)):
                item = answer.items.masked
                if isinstance(item, messages.Masked):
                    agreed[item.party] = item.agreement
        self._mask_sybils(members, shared, agreed)
        everybody = tuple(sorted(agreed))
        if self.plan.name == "two questions":
            self._copies = {party: self.parties.copy_of(party) for party in self._asked()}
            self._confirm_and_reveal(tuple(p for p in everybody if p != VICTIM))
            for party, context in self._copies.items():
                self.parties.contexts[party] = context
        if everybody == members:
            self._reveal(everybody, agreed)
        else:
            self._confirm_and_reveal(everybody)

    def _confirm_and_reveal(self, survivors: tuple[int, ...]) -> None:
        agreed: dict[int, bytes] = {}
        for party in self._asked():
            if party in survivors:
                for answer in self._request(party, messages.ConfirmRequest(survivors)):
                    item = answer.items.confirm
                    if isinstance(item, messages.Confirm):
                        agreed[item.party] = item.agreement
        for party, state in self._sybils.items():
            if party in survivors:
                self._sybils[party], item = sybils.confirm(state, messages.ConfirmRequest(survivors))
                agreed[party] = item.agreement
        self._reveal(survivors, agreed)

    def _reveal(self, survivors: tuple[int, ...], agreed: dict[int, bytes]) -> None:
        request = messages.UnmaskRequest(survivors, agreed)
        for party in self._asked():
            if party in survivors:
                self._request(party, request)
        for party, state in list(self._sybils.items()):
            if len(agreed) >= self._heard.setup.quorum:
                _, item = sybils.unmask(state, request)
                self._heard.reveals.append(item)
                del self._sybils[party]

    # What is sent

    def _setup(self) -> Setup:
        rng, roster, session = self._rng, self.parties.roster, keys.new().to_bytes()
        name = self.plan.name
        if name == "roster of one":
            roster = roster[VICTIM : VICTIM + 1]
        if name == "invented parties":
            self._invented = {v: keys.new() for v in (1, 2, 3)}
            roster = (roster[VICTIM], *(messages.identity_key(key) for key in self._invented.values()))
        quorum = 1 if name == "quorum of one" else None
        setup = protocol.setup(roster, WEIGHTS + 2, 1, session=session, quorum=quorum)
        if name == "sparse graph":
            setup = setup._replace(degree=2, threshold=int(rng.integers(1, 4)))
        if name == "unbound model":
            setup = setup._replace(bind_model=False)
        if name == "random setup":
            sizes = {field: int(rng.integers(0, 6)) for field in ("quorum", "threshold", "degree")}
            setup = setup._replace(**{name: size for name, size in sizes.items() if rng.random() < 0.5})
        return setup

    def _task_of(self, party: int) -> tuple[RecordDict, task.Format, str]:
        """What a participant is told to train, with the lies that single out the victim's update."""
        told, form, kind = content(), task.Format(num_parties=len(self._heard.setup.roster)), "train"
        dead = ArrayRecord({"w": Array(np.full(WEIGHTS, 1e6, np.float32))})
        others = party != VICTIM
        match self.plan.name:
            case "format" if others:
                form = form._replace(clip=self._clip)
            case "format":
                form = form._replace(clip=0.5)
            case "weight":
                form = form._replace(weight="victim")
            case "configuration" if others:
                told["config"] = ConfigRecord({"learning-rate": 0.0, "server-round": 1})
            case "dead models" | "unbound model" if others:
                told["arrays"] = dead
            case "decoy" if others:
                told = RecordDict({"decoy": model(), "arrays": dead, "config": told["config"]})
            case "decoy":
                told = RecordDict({"decoy": model(), **dict(told.items())})
            case "function" if others:
                kind = "train.other"
        return told, form, kind

    def _asked(self) -> range | tuple[int, ...]:
        alone = self.plan.alone or self.plan.name in ("roster of one", "quorum of one", "invented parties")
        return (VICTIM,) if alone else _EVERYBODY

    def _request(
        self, party: int, request: Any, told: tuple[RecordDict, task.Format, str] | None = None
    ) -> list[Answer]:
        records, form, kind = told or (RecordDict(), None, "train")
        number = self._heard.setup.round
        if self._rng.random() < self.plan.rate / 2:
            request = alter(self._rng, request)
        return self._ask(party, wire.put(records, wire.Items(requests=((number, request),), format=form)), kind)

    def _ask(self, party: int, sent: RecordDict, kind: str = "train") -> list[Answer]:
        """Sends a message: as it is, altered, repeated or not at all."""
        rng, rate = self._rng, self.plan.rate
        if rng.random() < rate / 3:
            return []
        if rng.random() < rate:
            sent = alter_content(rng, sent)
        if rng.random() < rate / 3:
            self._replays.append((party, sent, kind))
        before = self.parties.copy_of(party)
        answers = [self.parties.deliver(party, sent, kind)]
        if rng.random() < rate:
            answers.append(self.parties.deliver(party, sent, kind))
        if self.plan.name == "old state":  # Flower restores the context from before the answer, and asks again
            answers.append(self.parties.deliver(party, sent, kind, before))
        for answer in answers:
            self._hear(answer)
        return answers

    def _hear(self, answer: Answer) -> None:
        self.answers.append(answer)
        masked, reveal = answer.items.masked, answer.items.reveal
        if isinstance(masked, messages.Masked) and answer.words is not None and answer.update is not None:
            self._heard.masked.append((masked.party, masked, answer.words, answer.update))
        if isinstance(reveal, messages.Reveal):
            self._heard.reveals.append(reveal)

    @staticmethod
    def _note(answer: Answer, name: str, into: dict[int, Any]) -> None:
        item = getattr(answer.items, name)
        if item is not None and item.party not in into:
            into[item.party] = item

    # Invented parties

    def _join_sybils(self) -> None:
        if self.plan.name != "invented parties" or not self._heard.advertised:
            return
        policy = protocol.Policy(1, 0.0, bind_model=False)
        for party, identity in self._invented.items():
            self._sybils[party], item = sybils.join(self._heard.setup, identity, keys.new(), policy)
            self._heard.advertised[party] = item

    def _share_sybils(self, shared: dict[int, Any]) -> None:
        for party, state in self._sybils.items():
            self._sybils[party], shared[party] = sybils.share(state, messages.ShareRequest(self._heard.advertised))

    def _mask_sybils(self, members: tuple[int, ...], shared: dict[int, Any], agreed: dict[int, bytes]) -> None:
        digests = {item.task for _, item, _, _ in self._heard.masked} or {sybils.NO_TASK}
        nothing = np.zeros(self._heard.setup.num_words, np.uint32)
        for party, state in self._sybils.items():
            sealed = {v: shared[v].sealed[party] for v in members if party in shared[v].sealed}
            request = messages.MaskRequest(members, sealed)
            self._sybils[party], item = sybils.mask(state, request, nothing, next(iter(digests)))
            self._heard.masked.append((party, item, nothing, nothing))
            agreed[party] = item.agreement
