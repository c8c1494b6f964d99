"""A round in progress, and the log entry that it leaves."""

from typing import NamedTuple

from smark_jax.aggregation.protocol import server


class RoundLog(NamedTuple):
    """What happened in a round.

    Attributes:
      round: its number.
      nodes: Flower's ids of the nodes whose updates are in the sum.
      examples: the number of examples they trained on.
      clipped: the number of weight changes that were clipped.
      seconds: the time from the first message to the opened sum.
      error: why no sum was opened; empty if one was.
    """

    round: int
    nodes: tuple[int, ...]
    examples: int
    clipped: int
    seconds: float
    error: str


class Round:
    """A round of the protocol, the node of each party, and the number of the Flower round that it serves."""

    def __init__(self, state: server.Server, nodes: list[int], server_round: int) -> None:
        self.state, self.nodes, self.server_round = state, nodes, server_round
