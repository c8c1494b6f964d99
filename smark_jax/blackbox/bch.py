r"""Binary BCH codes: the cyclic codes that protect payloads in images.

A word's bits, first to last, are the coefficients of :math:`x^{n-1}` to 1, with :math:`n = 2^m - 1`. Codewords are the
multiples of the generator, which has the roots :math:`\alpha, \alpha^2, \dots, \alpha^{2t}` of GF(:math:`2^m`); the
message comes first and its remainder after it. Decoding corrects up to t wrong bits by syndromes, the Berlekamp-Massey
algorithm, and a search of all positions, each on all words at once.

References:
  Bose, Ray-Chaudhuri, "On a class of error correcting binary group codes", Information and Control 3, 1960.
  Massey, "Shift-register synthesis and BCH decoding", IEEE Trans. Information Theory 15, 1969.
"""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

_PRIMITIVE = {4: 0b10011, 9: 0b1000010001}  # x^4 + x + 1 and x^9 + x^4 + 1


class Code(NamedTuple):
    r"""A code and the tables of its field.

    Attributes:
      length: n, bits of a codeword.
      message: k, bits of a message.
      errors: t, the number of wrong bits that can be corrected.
      powers: :math:`\alpha^i` for i in [0, n), as an int whose bits are the coefficients.
      logs: the inverse of ``powers``; the entry of 0 is 0.
      parity: the remainders of the messages with a single bit, shape [k, n - k].
    """

    length: int
    message: int
    errors: int
    powers: Int[np.ndarray, " n"]
    logs: Int[np.ndarray, " q"]
    parity: Int[np.ndarray, "k r"]


@functools.cache
def code(degree: int, errors: int) -> Code:
    """The code of length 2^degree - 1 that corrects this many errors; degrees are those of ``_PRIMITIVE``."""
    length = 2**degree - 1
    powers, logs = np.ones(length, np.int64), np.zeros(length + 1, np.int64)
    for i in range(1, length):
        value = int(powers[i - 1]) << 1
        powers[i] = value ^ _PRIMITIVE[degree] if value > length else value
    logs[powers] = np.arange(length)
    roots = {(j << shift) % length for j in range(1, 2 * errors + 1) for shift in range(degree)}
    generator = np.ones(1, np.int64)  # coefficients over the field, the highest first; all turn out to be 0 or 1
    for root in sorted(roots):
        scaled = np.where(generator > 0, powers[(logs[generator] + root) % length], 0)
        generator = np.append(generator, 0) ^ np.insert(scaled, 0, 0)
    rows = [generator[1:]]  # the remainder of x^r, then of x^(r+1), ...
    for _ in range(length - len(roots) - 1):
        rows.append(np.append(rows[-1][1:], 0) ^ rows[-1][0] * generator[1:])
    return Code(length, length - len(roots), errors, powers, logs, np.stack(rows[::-1]))


def encode(code: Code, messages: Int[np.ndarray, "B k"]) -> Int[np.ndarray, "B n"]:
    """Codewords: each message's bits, and its remainder."""
    # Counts of up to n ones are exact in float32, whose matrix products are fast where those of integers are not.
    counts = messages.astype(np.float32) @ code.parity.astype(np.float32)
    return np.concatenate([messages, counts % 2], axis=1).astype(np.uint8)


def decode(code: Code, words: Int[np.ndarray, "B n"]) -> tuple[Int[np.ndarray, "B k"], Bool[np.ndarray, " B"]]:
    """Messages, and which words have a codeword within t bits; the messages of the others are zeros."""
    ascending = words[:, ::-1].astype(bool)
    places = np.arange(code.length)
    syndromes = np.stack(
        [
            np.bitwise_xor.reduce(np.where(ascending, code.powers[places * j % code.length], 0), axis=1)
            for j in range(1, 2 * code.errors + 1)
        ],
        axis=1,
    )
    locator, count = _shortest_register(code, syndromes)
    # An error at place p is a root of the locator at alpha^-p.
    values = np.zeros((len(words), code.length), np.int64)
    for i in range(code.errors + 1):
        values ^= _times(code, locator[:, i : i + 1], code.powers[-places * i % code.length])
    wrong = values == 0
    found = (count <= code.errors) & (wrong.sum(axis=1) == count)
    corrected = ((ascending ^ wrong) & found[:, None])[:, ::-1]
    return corrected[:, : code.message].astype(np.uint8), found


def _shortest_register(
    code: Code, syndromes: Int[np.ndarray, "B s"]
) -> tuple[Int[np.ndarray, "B c"], Int[np.ndarray, " B"]]:
    """Berlekamp-Massey: each row's shortest linear recurrence, as the coefficients of the locator, and its length."""
    batch, steps = syndromes.shape
    now = np.zeros((batch, steps + 1), np.int64)
    now[:, 0] = 1
    before, of_before, length = now, np.ones(batch, np.int64), np.zeros(batch, np.int64)
    for step in range(steps):
        gap = np.bitwise_xor.reduce(_times(code, now[:, : step + 1], syndromes[:, step::-1]), axis=1)
        before = np.pad(before, ((0, 0), (1, 0)))[:, :-1]
        ratio = np.where(gap > 0, code.powers[(code.logs[gap] - code.logs[of_before]) % code.length], 0)
        longer = (gap > 0) & (2 * length <= step)
        after = now ^ _times(code, ratio[:, None], before)
        before = np.where(longer[:, None], now, before)
        of_before = np.where(longer, gap, of_before)
        length = np.where(longer, step + 1 - length, length)
        now = after
    return now, length


def _times(code: Code, a: Int[np.ndarray, "..."], b: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
    """Products in the field."""
    return np.where((a > 0) & (b > 0), code.powers[(code.logs[a] + code.logs[b]) % code.length], 0)
