r"""What all parties of one round know beforehand, and the graph of who masks with whom.

Full graph (Bonawitz et al. 2017): everybody shares masks with everybody. Sparse graph (Bell et al. 2020, SecAgg+):
everybody has k neighbours on a ring of random order, the k/2 nearest on either side (a Harary graph).
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from smark_jax import _validate, errors


class ProtocolError(errors.SmarkError):
    """Somebody broke the protocol, or too few parties are left: nothing is opened."""


def refuse(who: str, expected: str, got: str, cause: str) -> ProtocolError:
    """A :class:`ProtocolError` whose message has the project's common form; the caller raises it."""
    return _validate.fail(who, expected, got, cause, kind=ProtocolError)


def pack(*parts: bytes | int | str) -> bytes:
    """Parts with their lengths, so that no two lists of parts give the same bytes."""
    encoded = [
        part if isinstance(part, bytes) else str(part).encode() if isinstance(part, int) else part.encode()
        for part in parts
    ]
    return b"".join(len(part).to_bytes(8, "little") + part for part in encoded)


class Setup(NamedTuple):
    """One round's public parameters. Every signature and every key of the round is bound to all of them.

    Attributes:
      session: random bytes that name the training run, so that its round numbers are its own.
      round: the round's number.
      roster: every party's Ed25519 identity, 32 bytes each; a party's number is its place.
      num_words: words of a message.
      quorum: the fewest parties whose sum may be opened.
      threshold: how many shares of a party's secret recover it.
      degree: how many neighbours a party masks with; at least the number of parties minus one is the full graph.
      bind_model: whether the values of the model belong to the task that masks are bound to. Everything else that a
        party is told belongs to it in any case.
    """

    session: bytes
    round: int
    roster: tuple[bytes, ...]
    num_words: int
    quorum: int
    threshold: int
    degree: int
    bind_model: bool = True

    @property
    def context(self) -> bytes:
        """SHA-256 of all parameters."""
        numbers = (self.round, self.num_words, self.quorum, self.threshold, self.degree, int(self.bind_model))
        return hashlib.sha256(pack("smark-jax round v2", self.session, *numbers, *self.roster)).digest()


def setup(
    roster: Sequence[bytes],
    num_words: int,
    round: int = 0,
    *,
    session: bytes = b"",
    quorum: int | None = None,
    neighbourhood: "Neighbourhood | None" = None,
    bind_model: bool = True,
) -> Setup:
    """The parameters of a round, checked.

    Args:
      roster: the parties' Ed25519 public keys, 32 bytes each.
      num_words: words of a message.
      round: its number.
      session: random bytes that name the training run.
      quorum: the fewest parties whose sum may be opened. By default floor(2n/3) + 1: then even a server that tells
        parties different things never gets both of a party's secrets, while fewer than a third of the parties help it.
        An honest but curious server needs no more than quorum colluding parties to be absent.
      neighbourhood: a sparse graph's parameters from :func:`neighbourhood`; by default the graph is full and the
        threshold is the quorum.
      bind_model: whether masks cancel only between parties that were given the same model, value by value.

    Raises:
      SmarkError: when the roster is empty or repeats an identity, or the quorum does not lie in 1 to n.
    """
    roster = tuple(bytes(identity) for identity in roster)
    n = len(roster)
    _validate.positive("setup", "num_words", num_words)
    if n == 0 or len(set(roster)) < n or any(len(identity) != 32 for identity in roster):
        got = f"{n} identities, {len(set(roster))} of them distinct"
        raise _validate.fail("setup", "distinct identities of 32 bytes", got, "One Ed25519 public key for each party.")
    quorum = 2 * n // 3 + 1 if quorum is None else quorum
    _validate.positive("setup", "quorum (threshold)", quorum)
    if quorum > n:
        raise _validate.fail(
            "setup", f"a quorum (threshold) of at most {n} parties", str(quorum), "Nobody may drop out."
        )
    degree, threshold = neighbourhood or (n - 1, quorum)
    if threshold > degree + 1:
        cause = "Take both from aggregation.neighbourhood."
        raise _validate.fail("setup", f"a threshold of at most {degree + 1} holders", str(threshold), cause)
    return Setup(bytes(session), round, roster, num_words, quorum, threshold, min(degree, n - 1), bind_model)


@functools.lru_cache(maxsize=8)
def neighbours(degree: int, parties: tuple[int, ...], seed: bytes) -> dict[int, tuple[int, ...]]:
    """Each party's neighbours: everybody, or the nearest on a ring whose order the seed decides.

    Args:
      degree: neighbours of each; even when it is less than the number of the other parties.
      parties: who takes part.
      seed: public bytes that all parties know: here the hash of all advertised keys.

    Returns:
      Neighbours of each party in ascending order; the relation is symmetric.
    """
    n = len(parties)
    if degree >= n - 1:
        return {u: tuple(v for v in parties if v != u) for u in parties}
    ring = ring_of(parties, seed)
    steps = [step for step in range(-(degree // 2), degree // 2 + 1) if step]
    return {ring[i]: tuple(sorted(ring[(i + step) % n] for step in steps)) for i in range(n)}


def ring_of(parties: tuple[int, ...], seed: bytes) -> list[int]:
    """The parties in the order of the ring on which a sparse graph's neighbours are the nearest."""
    return sorted(parties, key=lambda party: hashlib.sha256(pack("ring", seed, party)).digest())


class Neighbourhood(NamedTuple):
    """A sparse graph's parameters: neighbours of each party, and shares (of degree + 1) that recover a secret."""

    degree: int
    threshold: int


def neighbourhood(
    num_parties: int,
    drop_rate: float,
    corruption_rate: float,
    *,
    security_bits: float = 40,
    correctness_bits: float = 20,
) -> Neighbourhood:
    r"""The sparsest graph that is safe and robust at stated rates.

    With h = k + 1 holders of each party's shares, c of them corrupt and d of them dropped out, c and d hypergeometric
    because the ring's order is random, the smallest even k and some t are taken such that

    * n P(2 t <= h + c) <= 2^-security: nobody's both secrets can be collected, whatever a server tells whom
      (which includes c < t: the corrupt alone recover nothing);
    * the graph of the honest who stay is connected: it falls apart only when k/2 parties in a row are corrupt or
      dropped, n prod_{i < k/2} (bad - i)/(n - i) <= 2^-security (Bell et al. 2020, section 3, as a union bound);
    * n P(h - d < t) <= 2^-correctness: everybody's secret that is needed can be recovered.

    Whoever may choose among several graphs (by leaving parties out, or trying keys) multiplies the first two by the
    number of graphs tried.

    Args:
      num_parties: n.
      drop_rate: share of all parties that may drop out, 0 to 1.
      corruption_rate: share of all parties that may work together against the others, 0 to 1.
      security_bits: as above.
      correctness_bits: as above.

    Returns:
      Degree and threshold; the full graph with degree n - 1 where no sparser one will do.

    Raises:
      SmarkError: when not even the full graph is safe at these rates: it needs drop_rate + corruption_rate / 2 < 1/2.
    """
    _validate.positive("neighbourhood", "num_parties", num_parties)
    for name, rate in (("drop_rate", drop_rate), ("corruption_rate", corruption_rate)):
        if not 0 <= rate < 1:
            raise _validate.fail("neighbourhood", f"{name} of 0 to 1", str(rate), "It is a share of all parties.")
    n = num_parties
    corrupt, dropped = math.floor(corruption_rate * n), math.floor(drop_rate * n)
    for k in (*range(2, n - 1, 2), n - 1):
        full = k == n - 1
        h = k + 1
        log_dropped = _log_tail(n - 1, min(dropped, n - 1), k)
        log_others = _log_tail(n - 1, max(dropped - 1, 0), k)  # of somebody who dropped out as well
        if not full and _log_gap(n, corrupt + dropped, k // 2) > -security_bits * math.log(2):
            continue
        for t in range(h // 2 + 1, h + 1):
            safe = log_both_secrets(n, corrupt, k, t) <= -security_bits * math.log(2)
            failure = max(log_dropped[h - t + 1], log_others[max(0, k - t + 1)] if dropped else -math.inf)
            sure = failure + math.log(n) <= -correctness_bits * math.log(2)
            if safe and sure:
                return Neighbourhood(k, t)
    raise _validate.fail(
        "neighbourhood",
        "rates at which a graph exists",
        f"drop-out of {drop_rate:g} and corruption of {corruption_rate:g} among {n} parties",
        "drop_rate + corruption_rate / 2 must stay below 1/2.",
    )


def log_both_secrets(num_parties: int, corrupt: int, degree: int, threshold: int) -> float:
    """Log of the bound n P(2 t <= h + c) on the probability that both secrets of some party can be collected."""
    tail = _log_tail(num_parties - 1, min(corrupt, num_parties - 1), degree)
    return float(tail[max(0, 2 * threshold - degree - 1)]) + math.log(num_parties)


def most_corrupt(num_parties: int, corrupt: int, length: int, security_bits: float) -> int:
    """The most corrupt parties among any ``length`` in a row; more occur with probability 2^-security at most."""
    tail = _log_tail(num_parties, min(corrupt, num_parties), length) + math.log(num_parties)
    return int(np.argmax(tail <= -security_bits * math.log(2))) - 1


@functools.lru_cache(maxsize=64)
def _log_tail(population: int, marked: int, drawn: int) -> np.ndarray:
    """Log P(at least c marked among those drawn), for c = 0 to drawn + 1."""
    from scipy import stats  # half a second, which no round needs

    if drawn == 0:
        return np.array([0.0, -math.inf])
    return stats.hypergeom.logsf(np.arange(drawn + 2) - 1, population, marked, drawn)


def _log_gap(n: int, bad: int, length: int) -> float:
    """Log of the bound on the probability that some ``length`` parties in a row are bad."""
    if length > bad:
        return -math.inf
    return math.log(n) + sum(math.log((bad - i) / (n - i)) for i in range(length))
