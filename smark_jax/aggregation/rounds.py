"""A whole round in memory: the state machines of all parties and the server, without a network."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from smark_jax import _trees, _validate, keys
from smark_jax._types import PyTree
from smark_jax.aggregation.protocol import messages, server
from smark_jax.aggregation.protocol import party as parties
from smark_jax.aggregation.protocol.parameters import Neighbourhood, setup
from smark_jax.aggregation.protocol.policy import Policy

Stage = Literal["keys", "shares", "masked", "confirm", "unmask"]


class RoundResult(NamedTuple):
    """The sum that a round opened.

    Attributes:
      total: the survivors' sum modulo 2^32, a tree of uint32 like each update.
      survivors: the parties whose words are in it, ascending.
    """

    total: PyTree
    survivors: tuple[int, ...]


def run_round(
    updates: Mapping[int, PyTree],
    threshold: int,
    drop: Mapping[int, Stage] = {},  # never changed
    *,
    round: int = 0,
    neighbourhood: Neighbourhood | None = None,
    tamper: Callable[[Any], Any] = lambda message: message,
) -> RoundResult:
    """Drives all parties and the server through a round of secure aggregation.

    Args:
      updates: by party number, a tree of uint32 as from :func:`smark_jax.aggregation.encode`; all of one structure.
      threshold: t, the fewest parties whose sum may be opened, and (in the full graph) the number of shares that
        recover a secret. Against a lying server, use t > 2n/3.
      drop: by party, the stage at which it drops out: its messages from this stage on never arrive. Words that have
        arrived stay in the sum. Stage "confirm" takes place only when somebody dropped out at "masked".
      round: the round's number.
      neighbourhood: parameters of a sparse graph, from :func:`smark_jax.aggregation.neighbourhood`.
      tamper: applied to every message and request in transit, for tests.

    Returns:
      The sum, and the parties that are in it.

    Raises:
      ProtocolError: when fewer than the threshold are left at any stage, or a message was tampered with. Nothing of the
        sum is opened.
      SmarkError: when updates are not of one structure or not uint32, or a stage or party is unknown.

    Examples:
      >>> import numpy as np
      >>> from smark_jax import aggregation
      >>> updates = {party: {"w": np.full(3, party, np.uint32)} for party in range(5)}
      >>> result = aggregation.run_round(updates, threshold=4, drop={2: "masked"})
      >>> result.survivors, result.total["w"].tolist()
      ((0, 1, 3, 4), [8, 8, 8])
    """
    _trees.same("run_round", updates)
    for party, stage in drop.items():
        if party not in updates or stage not in server.STAGES:
            got = f"party {party} at stage {stage!r}"
            raise _validate.fail(
                "run_round", f"drop-outs of {sorted(updates)} at {server.STAGES}", got, "Is it misspelt?"
            )
    numbers = sorted(updates)
    leaves, structure = jax.tree.flatten(updates[numbers[0]])
    if any(np.asarray(leaf).dtype != np.uint32 for leaf in leaves):
        got = f"{sorted({str(np.asarray(leaf).dtype) for leaf in leaves})}"
        raise _validate.fail(
            "run_round", "updates of uint32 words", got, "Encode floats with aggregation.encode first."
        )
    words = [np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(updates[p])]) for p in numbers]
    identities = [keys.new() for _ in numbers]
    roster = [messages.identity_key(identity) for identity in identities]
    agreed = setup(
        roster, words[0].size, round, session=keys.new().to_bytes(), quorum=threshold, neighbourhood=neighbourhood
    )
    # One program runs all parties, so the caller's settings are their policy.
    policy = Policy(threshold, 0.0, None if neighbourhood is None else 0.0, -math.inf)
    gone = {numbers.index(party): server.STAGES.index(stage) for party, stage in drop.items()}
    state, crowd, requests = server.start(agreed), {}, {}

    def answer(place: int, request: messages.Request | None) -> messages.Message:
        match request:
            case None:
                crowd[place], message = parties.join(agreed, identities[place], keys.new(), policy)
            case messages.ShareRequest():
                crowd[place], message = parties.share(crowd[place], request)
            case messages.MaskRequest():
                crowd[place], message = parties.mask(crowd[place], request, words[place])
            case messages.ConfirmRequest():
                crowd[place], message = parties.confirm(crowd[place], request)
            case messages.UnmaskRequest():
                crowd[place], message = parties.unmask(crowd[place], request)
        return message

    requests: Mapping[int, messages.Request | None] = dict.fromkeys(range(len(numbers)))
    while state.stage != "done":
        for place, request in requests.items():
            if gone.get(place, len(server.STAGES)) > server.STAGES.index(state.stage):
                request = tamper(request) if request is not None else None
                state = server.receive(state, tamper(answer(place, request)))
        state, requests = server.close(state)
    total = server.open_sum(state)
    ends = np.cumsum([np.size(leaf) for leaf in leaves])[:-1]
    parts = [part.reshape(np.shape(leaf)) for part, leaf in zip(np.split(total, ends), leaves, strict=True)]
    return RoundResult(jax.tree.unflatten(structure, parts), tuple(numbers[place] for place in state.survivors))
