"""What a server that keeps all answers can compute from them, and whether it is more than a sum over a quorum."""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from smark_jax import aggregation
from smark_jax.aggregation import exchange
from smark_jax.aggregation.protocol import Setup, messages, sharing
from smark_jax.aggregation.protocol import party as parties
from smark_jax.aggregation.protocol.parameters import neighbours

_MOST_MESSAGES = 8
_ALIKE = 0.97
"""Correlation above which a sum is one participant's update; two others in it alone lower it to some 0.58."""


class Heard(NamedTuple):
    """Everything about one setup.

    Attributes:
      setup: what the parties joined.
      advertised: keys by party, as sent on.
      masked: who sent which words, with the true words and the true update behind them.
      reveals: all shares.
      invented: parties that are the server's own.
    """

    setup: Setup
    advertised: dict[int, messages.Keys]
    masked: list[tuple[int, messages.Masked, np.ndarray, np.ndarray]]
    reveals: list[messages.Reveal]
    invented: frozenset[int]


class Opened(NamedTuple):
    """A combination of updates that the server can compute: its parties, and whose update it is alone, if anybody's."""

    parties: tuple[int, ...]
    single: int | None


def opened(heard: Heard) -> list[Opened]:
    """Every signed combination of the answers from which all masks fall off.

    The server takes off what the shares recover, then tries all combinations. The judge knows the true words and sees
    when one is bare: it needs no theory of which masks should have cancelled.
    """
    rows: list[Any] = []
    for row in heard.masked:
        if not any((row[1].words == other[1].words).all() for other in rows) and len(rows) < _MOST_MESSAGES:
            rows.append(row)
    if not rows:
        return []
    stripped = np.stack([_strip(heard, party, message) for party, message, _, _ in rows])
    true = np.stack([words for _, _, words, _ in rows])
    found = []
    for signs in itertools.product((1, 0, -1), repeat=len(rows)):
        if next((sign for sign in signs if sign), 0) != 1:
            continue  # empty, or the negative of another combination
        coefficients = np.array(signs).astype(np.uint32)[:, None]
        total = (coefficients * stripped).sum(axis=0, dtype=np.uint32)
        if (total == (coefficients * true).sum(axis=0, dtype=np.uint32)).all():
            chosen = [row for row, sign in zip(rows, signs, strict=True) if sign]
            who = tuple(sorted({party for party, _, _, _ in chosen} - heard.invented))
            found.append(Opened(who, _single(total, chosen, min(signs) < 0)))
    return found


def breach(found: list[Opened], least: int) -> str | None:
    """What was opened that must not be: fewer than ``least`` parties' sum, or a sum that is one party's update."""
    for one in found:
        if one.parties and len(one.parties) < least:
            return f"the sum of parties {one.parties} alone"
        if one.single is not None:
            return f"a sum of {len(one.parties)} that is party {one.single}'s update"
    return None


def _single(total: np.ndarray, chosen: list[Any], signed: bool) -> int | None:
    if signed:
        return None
    offset = aggregation.FixedPoint(1.0, 4).offset
    levels = (total - np.uint32(len(chosen) * offset))[:-2].view(np.int32).astype(np.float64)
    if levels.std() == 0:
        return None
    for party, _, _, update in chosen:
        if update.size == levels.size and update.std() and np.corrcoef(levels, update)[0, 1] > _ALIKE:
            return party
    return None


def _strip(heard: Heard, party: int, message: messages.Masked) -> np.ndarray:
    """A party's words without the masks that the shares of all answers take off."""
    setup, words = heard.setup, message.words.copy()
    if words.shape != (setup.num_words,):
        return words
    bound = messages.transcript(setup, heard.advertised)
    seed = _recover(heard, party, "seeds")
    if seed is not None and parties.seed_hash(setup, party, seed) == heard.advertised[party].seed_hash:
        words -= parties.seed_stream(setup, party, seed)
    own = _recover(heard, party, "secrets")
    for other in heard.advertised:
        if other == party:
            continue
        theirs = _recover(heard, other, "secrets")
        if own is not None and exchange.public_key(own) == heard.advertised[party].mask:
            peer = heard.advertised[other].mask
            words -= parties.pair_stream(setup, bound, message.task, party, other, own, peer)
        elif theirs is not None and exchange.public_key(theirs) == heard.advertised[other].mask:
            # The other party would have added the negative of what this party added.
            peer = heard.advertised[party].mask
            words += parties.pair_stream(setup, bound, message.task, other, party, theirs, peer)
    return words


def _recover(heard: Heard, owner: int, kind: str) -> Any:
    advertised = tuple(sorted(heard.advertised))
    if owner not in advertised:
        return None
    bound = messages.transcript(heard.setup, heard.advertised)
    holders = sorted((owner, *neighbours(heard.setup.degree, advertised, bound)[owner]))
    shares: dict[int, bytes] = {}
    for reveal in heard.reveals:
        given: Mapping[int, bytes] = getattr(reveal, kind)
        if owner in given and reveal.party in holders:
            shares[holders.index(reveal.party)] = given[owner]
    if len(shares) < heard.setup.threshold:
        return None
    return sharing.combine(shares, heard.setup.threshold)
