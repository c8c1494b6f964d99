"""The server's side: it collects each stage's messages, closes the stage, and at the end opens the sum and only that.

::

    server = start(setup)
    for stage in ("keys", "shares", "masked", ["confirm",] "unmask"):
        server = receive(server, message)         # for each that arrives; a bad one raises and changes nothing
        server, requests = close(server)          # what to ask whom next; raises when too few are left
    words = open_sum(server)

When nobody drops out after "shares" the agreements came with the masked words, and the stage "confirm" is left out.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt32

from smark_jax import _validate, keys
from smark_jax.aggregation import exchange
from smark_jax.aggregation.protocol import messages, sharing
from smark_jax.aggregation.protocol import party as parties
from smark_jax.aggregation.protocol.parameters import Setup, neighbours, refuse

STAGES = ("keys", "shares", "masked", "confirm", "unmask")


class Server(NamedTuple):
    """What the server carries. It holds no secret until parties reveal theirs at the last stage.

    Attributes:
      setup: the round.
      stage: whose messages it takes now; "done" when the sum may be opened.
      task: SHA-256 of the round's task, once parties are asked for their words.
      advertised: keys by party.
      transcript: their hash.
      shared: shares by party.
      masked: by party, its agreement in advance.
      total: sum of all masked words modulo 2^32.
      survivors: whose words are in the sum.
      agreements: by party, to these survivors.
      revealed: shares by party.
    """

    setup: Setup
    stage: str = "keys"
    task: bytes = parties.NO_TASK
    advertised: Mapping[int, messages.Keys] = {}
    transcript: bytes = b""
    shared: Mapping[int, messages.Shares] = {}
    masked: Mapping[int, bytes] = {}
    total: UInt32[np.ndarray, " num_words"] | None = None
    survivors: tuple[int, ...] = ()
    agreements: Mapping[int, bytes] = {}
    revealed: Mapping[int, messages.Reveal] = {}

    def __repr__(self) -> str:
        return f"Server(round {self.setup.round} of {len(self.setup.roster)} parties, stage {self.stage!r})"

    @property
    def waiting_for(self) -> tuple[int, ...]:
        """Who was asked at this stage and has not answered."""
        asked = {
            "keys": range(len(self.setup.roster)),
            "shares": self.advertised,
            "masked": self.shared,
            "confirm": self.masked,
            "unmask": self.masked,
        }
        return tuple(sorted(set(asked.get(self.stage, ())) - set(self.answered)))

    @property
    def answered(self) -> Mapping[int, Any]:
        """The messages that arrived at this stage, by party."""
        came = {
            "keys": self.advertised,
            "shares": self.shared,
            "masked": self.masked,
            "confirm": self.agreements,
            "unmask": self.revealed,
        }
        return came.get(self.stage, {})


_KIND = {
    messages.Keys: "keys",
    messages.Shares: "shares",
    messages.Masked: "masked",
    messages.Confirm: "confirm",
    messages.Reveal: "unmask",
}


def stage_of(message: object) -> str | None:
    """The stage at which a message is due; None for anything that is not a message."""
    return _KIND.get(type(message))


def start(setup: Setup) -> Server:
    """A round's server, waiting for keys."""
    return Server(setup)


def receive(server: Server, message: messages.Message) -> Server:
    """Takes a party's message.

    Raises:
      ProtocolError: when it is of another stage or round, repeated, from nobody who was asked, wrongly signed, or (for
        words) made for another task. The server's former state is still good: leave the message out and go on,
        as if its sender had dropped out.
    """
    kind, party, setup = _KIND[type(message)], message.party, server.setup
    if kind != server.stage:
        cause = "It came late, early, or twice."
        raise refuse("server", f"a message of stage {server.stage!r}", f"one of {kind!r} from party {party}", cause)
    if party not in server.waiting_for:
        cause = "It was asked for nothing, or has answered already (a replay?)."
        raise refuse("server", f"a message of {server.waiting_for}", f"one of party {party}", cause)
    if isinstance(message, messages.Confirm):
        digest = messages.agreement_content(server.task, server.survivors)
        messages.verify(setup, "agreement", server.transcript, party, digest, message.agreement)
        return server._replace(agreements={**server.agreements, party: message.agreement})
    messages.verify(setup, kind, server.transcript, party, messages.content(message), message.signature)
    if isinstance(message, messages.Keys):
        parties.check_keys(message, server.advertised)
        return server._replace(advertised={**server.advertised, party: message})
    if isinstance(message, messages.Shares):
        _same("shares for", party, set(message.sealed), set(_neighbours(server)[party]))
        return server._replace(shared={**server.shared, party: message})
    if isinstance(message, messages.Masked):
        return _add(server, message)
    holds = {party, *_neighbours(server)[party]} & set(server.shared)
    _same("seed shares of", party, set(message.seeds), holds & set(server.survivors))
    _same("mask shares of", party, set(message.secrets), holds - set(server.survivors))
    return server._replace(revealed={**server.revealed, party: message})


def close(server: Server, task: bytes = parties.NO_TASK) -> tuple[Server, dict[int, messages.Request]]:
    """Closes a stage with the messages that arrived.

    Args:
      server: the server.
      task: SHA-256 of all that parties are given along with the requests for their words, as for
        :func:`~smark_jax.aggregation.protocol.party.mask`; counts at the end of stage "shares".

    Returns:
      The server at its next stage, and what to ask each party that is still in. After "unmask" nobody is asked.

    Raises:
      ProtocolError: when fewer than the quorum are left: the round is over and nothing is opened.
    """
    setup, came = server.setup, server.answered
    if len(came) < setup.quorum:
        raise refuse(
            f"round {setup.round}, stage {server.stage!r}",
            f"at least {setup.quorum} of {len(setup.roster)} parties",
            f"{len(came)} {sorted(came)}",
            "Too many parties dropped out: nothing was opened. Begin a new round, or wait longer for the slow ones.",
        )
    everybody: dict[int, messages.Request] = {}
    if server.stage == "keys":
        server = server._replace(stage="shares", transcript=messages.transcript(setup, server.advertised))
        everybody = {u: messages.ShareRequest(server.advertised) for u in server.advertised}
    elif server.stage == "shares":
        server = server._replace(stage="masked", task=task)
        members = tuple(sorted(server.shared))
        for u in members:
            sealed = {v: server.shared[v].sealed[u] for v in members if u in server.shared[v].sealed}
            everybody[u] = messages.MaskRequest(members, sealed)
    elif server.stage == "masked":
        survivors = tuple(sorted(server.masked))
        server = server._replace(stage="confirm", survivors=survivors)
        if survivors == tuple(sorted(server.shared)):  # all agreed to exactly these beforehand
            return close(server._replace(agreements=server.masked))
        everybody = {u: messages.ConfirmRequest(survivors) for u in survivors}
    elif server.stage == "confirm":
        server = server._replace(stage="unmask")
        everybody = {u: messages.UnmaskRequest(server.survivors, server.agreements) for u in server.survivors}
    else:
        server = server._replace(stage="done")
    return server, everybody


def open_sum(server: Server) -> UInt32[np.ndarray, " num_words"]:
    """The sum of the survivors' words modulo 2^32.

    Survivors' self masks come off with their recovered seeds; the pair masks that drop-outs left uncancelled, with
    those parties' recovered mask secrets.

    Raises:
      ProtocolError: when a secret cannot be recovered, or is not the one that its owner committed to because somebody
        revealed a wrong share.
      SmarkError: before the last stage is closed.
    """
    if server.stage != "done" or server.total is None:
        got = f"stage {server.stage!r}"
        raise _validate.fail("open_sum", "a round whose last stage is closed", got, "Go on with receive and close.")
    setup = server.setup
    total = server.total.copy()
    for u in server.survivors:
        seed = _recover(server, u, "seeds")
        if parties.seed_hash(setup, u, seed) != server.advertised[u].seed_hash:
            raise _wrong_share(u)
        total -= parties.seed_stream(setup, u, seed)
    for v in sorted(set(server.shared) - set(server.survivors)):
        secret = _recover(server, v, "secrets")
        if exchange.public_key(secret) != server.advertised[v].mask:
            raise _wrong_share(v)
        for u in sorted(set(_neighbours(server)[v]) & set(server.survivors)):
            # What v would have added for u is the opposite of what u added for v.
            peer = server.advertised[u].mask
            total += parties.pair_stream(setup, server.transcript, server.task, v, u, secret, peer)
    return total


def _add(server: Server, message: messages.Masked) -> Server:
    setup, party = server.setup, message.party
    if message.task != server.task:
        cause = (
            "Updates made from different models, configurations or formats cannot be added. (Over Flower: does Masked "
            "know the run's configuration, run_config=context.run_config?)"
        )
        raise refuse("masked", f"party {party} to have the task of this round", "another one", cause)
    if message.words.shape != (setup.num_words,) or message.words.dtype != np.uint32:
        got = f"{message.words.dtype}{list(message.words.shape)}"
        raise refuse("masked", f"uint32[{setup.num_words}] from party {party}", got, "Does it run the same model?")
    digest = messages.agreement_content(server.task, tuple(sorted(server.shared)))
    messages.verify(setup, "agreement", server.transcript, party, digest, message.agreement)
    total = message.words if server.total is None else server.total + message.words
    return server._replace(masked={**server.masked, party: message.agreement}, total=total)


def _neighbours(server: Server) -> dict[int, tuple[int, ...]]:
    return neighbours(server.setup.degree, tuple(sorted(server.advertised)), server.transcript)


def _recover(server: Server, owner: int, kind: Any) -> keys.SecretKey:
    holders = sorted((owner, *_neighbours(server)[owner]))
    found = {
        place: getattr(server.revealed[u], kind)[owner]
        for place, u in enumerate(holders)
        if u in server.revealed and owner in getattr(server.revealed[u], kind)
    }
    if len(found) < server.setup.threshold:
        raise refuse(
            "unmask",
            f"{server.setup.threshold} shares of party {owner}'s secret",
            f"{len(found)} from {len(holders)} holders",
            "Too many of its neighbours dropped out: nothing was opened. A denser graph survives more.",
        )
    return sharing.combine(found, server.setup.threshold)


def _wrong_share(owner: int) -> Exception:
    cause = "A share was wrong: nothing is opened. Begin a new round; if it happens again, find out who."
    return refuse("unmask", f"the secret that party {owner} committed to", "another one", cause)


def _same(what: str, party: int, got: set[int], expected: set[int]) -> None:
    if got != expected:
        cause = "Each party sends one kind of share for each member, never both."
        raise refuse("server", f"{what} {sorted(expected)} from party {party}", f"{sorted(got)}", cause)
