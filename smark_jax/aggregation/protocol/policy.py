"""What a party insists on before it says anything, whatever the server proposes.

The server chooses roster, quorum, threshold and graph of a round. A party that believed it would give its bare update
to a round of one, or of many with a quorum of one. So each party holds a policy of its own and checks every
:class:`~smark_jax.aggregation.protocol.parameters.Setup` against it.
"""

import math
from collections.abc import Collection
from fractions import Fraction
from typing import NamedTuple

from smark_jax.aggregation.protocol.parameters import (
    Setup,
    log_both_secrets,
    most_corrupt,
    refuse,
    ring_of,
)

_LONGEST_SESSION = 64


class Policy(NamedTuple):
    """A party's own conditions. The default is what the guarantee promises: sums of more than two thirds of the roster.

    Attributes:
      least_parties: the fewest parties whose sum may be opened.
      least_share: quorum, and in the full graph threshold, must be more than this share of the roster. Against a server
        that lies, 2/3; a server that is merely curious needs less.
      corruption_rate: for sparse graphs, the share of all parties that may work together against this one; None refuses
        sparse graphs.
      security_bits: for sparse graphs, as for :func:`~smark_jax.aggregation.neighbourhood`. A server that tries 2^k
        rounds until it likes a graph takes k bits away.
      bind_model: whether masks must cancel only between parties that were given the same model.
      known: the identities that may be on a roster; None believes the server's roster, which may then be of parties
        that it invented.
    """

    least_parties: int = 3
    least_share: float = 2 / 3
    corruption_rate: float | None = None
    security_bits: float = 40.0
    bind_model: bool = True
    known: tuple[bytes, ...] | None = None

    def least_quorum(self, num_parties: int) -> int:
        """The fewest of so many parties whose sum may be opened."""
        share = Fraction(self.least_share).limit_denominator(1_000_000)  # so that 2/3 is exact
        return max(self.least_parties, math.floor(share * num_parties) + 1)

    def check(self, setup: Setup) -> None:
        """Refuses a setup that asks for less than this policy, or that makes no sense.

        Raises:
          ProtocolError: it names the parameter, and what the policy allows.
        """
        n = len(setup.roster)
        _check_sense(setup)
        if self.known is not None:
            strangers = sorted(identity.hex() for identity in set(setup.roster) - set(self.known))
            if strangers:
                got = f"{len(strangers)} others, such as {strangers[0][:16]}..."
                cause = "Ask the operators, and add the line to your roster if it is one of them."
                raise refuse("policy", "only identities of this party's roster", got, cause)
        least = self.least_quorum(n)
        if setup.quorum < least:
            cause = (
                f"This party lets no sum of fewer than {self.least_parties} parties be opened, or of at most "
                f"{self.least_share:.3g} of the roster. Where all agree to less, each party changes its own policy."
            )
            raise refuse("policy", f"a quorum of at least {least} of {n} parties", str(setup.quorum), cause)
        if self.bind_model and not setup.bind_model:
            cause = (
                "The server could give this party a model of its own. Fingerprints in participants' copies need that: "
                "allow it in this party's policy if you trust the server in this."
            )
            raise refuse("policy", "masks bound to the model", "a round without", cause)
        if setup.degree >= n - 1:
            if not least <= setup.threshold <= setup.quorum:
                expected = f"a threshold of {least} to {setup.quorum} shares"
                raise refuse("policy", expected, str(setup.threshold), "Fewer holders could open a party's secrets.")
        elif self.corruption_rate is None:
            cause = "Allow sparse graphs by saying in the policy which share of all parties may be corrupt."
            raise refuse("policy", "the full graph of masks", f"one of degree {setup.degree}", cause)

    def check_graph(self, setup: Setup, seed: bytes, parties: tuple[int, ...], present: Collection[int]) -> None:
        """Refuses a sparse graph that is unsafe with these parties, or that falls apart among those who are present.

        With h = k + 1 holders, n P(2 t <= h + c) <= 2^-security must hold. And of any k/2 in a row on the ring more
        must be present than are corrupt, except with that probability: a server that has seen the ring may call just
        those lost who connect two parts of it, and open each part's sum.

        Args:
          setup: the round.
          seed: of the ring, the transcript of keys.
          parties: who advertised keys.
          present: who is in at this stage.

        Raises:
          ProtocolError: when it is either. The full graph always passes.
        """
        n = len(parties)
        degree = min(setup.degree, n - 1)
        if setup.degree >= len(setup.roster) - 1 or self.corruption_rate is None:
            return
        corrupt = math.floor(self.corruption_rate * len(setup.roster))
        if log_both_secrets(n, corrupt, degree, setup.threshold) > -self.security_bits * math.log(2):
            cause = "Take degree and threshold from aggregation.neighbourhood, at the parties' corruption rate."
            expected = f"a graph that is safe with {corrupt} of {n} parties corrupt"
            raise refuse("policy", expected, f"degree {degree}, threshold {setup.threshold}", cause)
        if degree == n - 1:
            return
        half = degree // 2
        least = most_corrupt(n, corrupt, half, self.security_bits) + 1
        inside = [party in present for party in ring_of(parties, seed)]
        fewest = min(sum(inside[(start + step) % n] for step in range(half)) for start in range(n))
        if fewest < least:
            cause = "Too many neighbours dropped out, or the server left them out."
            raise refuse("policy", f"at least {least} of any {half} neighbours in a row", str(fewest), cause)


DEFAULT = Policy()


def _check_sense(setup: Setup) -> None:
    n = len(setup.roster)
    distinct = len(set(setup.roster)) == n and all(len(identity) == 32 for identity in setup.roster)
    sound = {
        "distinct identities of 32 bytes": (n > 0 and distinct, f"{n} identities"),
        f"a session of at most {_LONGEST_SESSION} bytes": (
            len(setup.session) <= _LONGEST_SESSION,
            f"{len(setup.session)} bytes",
        ),
        "a round below 2^32": (0 <= setup.round < 2**32, str(setup.round)),
        "at least one word": (setup.num_words > 0, str(setup.num_words)),
        f"a quorum of 1 to {n}": (0 < setup.quorum <= n, str(setup.quorum)),
        f"an even degree, or {n - 1} for the full graph": (
            setup.degree == n - 1 or (2 <= setup.degree < n - 1 and setup.degree % 2 == 0),
            str(setup.degree),
        ),
        f"a threshold of 1 to {setup.degree + 1}": (0 < setup.threshold <= setup.degree + 1, str(setup.threshold)),
    }
    for expected, (holds, got) in sound.items():
        if not holds:
            raise refuse("policy", expected, got, "Is the server honest, and of the same version of smark_jax?")
