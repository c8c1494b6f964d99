"""One occasion: what all suspects that are traced together have in common."""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from smark_jax import _validate, codes, keys
from smark_jax.tracing import decoders, scoring

NUM_DECOYS = 1024


class Case(NamedTuple):
    """What all suspects of one occasion have in common, validated."""

    book: scoring.Book
    alpha: float
    decoder: str
    serials: np.ndarray | None
    num_customers: int
    num_suspects: int
    num_alignments: int
    decoys: Float[np.ndarray, "D m"]

    @property
    def log_level(self) -> float:
        """Logarithm of the level at which one suspect's customers are tested, before the correction for N."""
        return math.log(self.alpha) - math.log(self.num_suspects) - math.log(self.num_alignments)


def occasion(
    book: scoring.Book,
    alpha: float,
    decoder: str,
    serials: Sequence[int] | None,
    num_suspects: int,
    num_alignments: int,
    num_chips: int,
) -> Case:
    """The occasion, or an error of ``trace`` that says which of its arguments is wrong."""
    _validate.probability("trace", "alpha", alpha)
    _validate.positive("trace", "num_suspects", num_suspects)
    _validate.positive("trace", "num_alignments", num_alignments)
    if decoder not in decoders.DECODERS:
        names = ", ".join(map(repr, decoders.DECODERS))
        raise _validate.fail("trace", f"a decoder of {names}", repr(decoder), "Is the name spelt right?")
    num_customers, length = scoring.size(book)
    if num_chips != length:
        cause = "Was the codebook made with another num_chips than the carrier?"
        raise _validate.fail("trace", f"chips of shape ({length:,},)", f"shape ({num_chips:,},)", cause)
    numbers = None
    if serials is not None and isinstance(book, codes.Codebook):
        cause = "Codebook(key, N) holds the words of serials 0 to N - 1; codes.codebook(key, serials) those of others."
        raise _validate.fail("trace", "serials only with an array of codewords", "a Codebook with serials", cause)
    if serials is not None:
        numbers = _validate.serials("trace", serials)
        _validate.vector("trace", "serials", numbers, num_customers, "One serial for each row of the codebook.")
    if isinstance(book, codes.Codebook):
        secret = book.key
    else:  # as secret as the words are
        secret = keys.from_bytes(hashlib.sha256(np.asarray(book, np.int8).tobytes()).digest())
    decoys = codes.codebook(keys.derive(secret, "decoys"), range(NUM_DECOYS), length)
    return Case(
        book, alpha, decoder, numbers, num_customers, num_suspects, num_alignments, np.asarray(decoys, np.float64)
    )
