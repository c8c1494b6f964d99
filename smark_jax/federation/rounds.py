"""A round under way, and what is said of it afterwards."""

from typing import NamedTuple

from smark_jax.aggregation.protocol import server


class RoundLog(NamedTuple):
    """What happened in a round.

    Attributes:
      round: its number.
      nodes: Flower's node ids of those whose updates are in the sum.
      examples: on how many examples they trained.
      clipped: how many weight changes were clipped.
      seconds: from the first message to the opened sum.
      error: why nothing was opened, or empty.
    """

    round: int
    nodes: tuple[int, ...]
    examples: int
    clipped: int
    seconds: float
    error: str


class Round:
    """A round of the protocol, which node each party is, and for which of Flower's rounds it is."""

    def __init__(self, state: server.Server, nodes: list[int], server_round: int) -> None:
        self.state, self.nodes, self.server_round = state, nodes, server_round
