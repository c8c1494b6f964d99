"""Malicious owners: what each puts into the suspect that it names, in units of segments' readings.

An owner knows everything but the word of the part that a dispute opens. The arithmetic of the group adds nothing to
that, so that most owners are simulated from the readings z on; :mod:`experiments.licence.hostile` runs the whole
protocol against some.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from smark_jax.licence import conviction

_WORDS = 200
_SUSPECTS = 50


class View(NamedTuple):
    """What an owner knows before a dispute.

    Attributes:
      rng: its chance.
      chips: how many segments a part has.
      earlier: the customer's word in the parts that earlier disputes opened.
      others: words of this part that other customers opened.
      enough: how many segments of equal size convict, if all of them agree with the word.
    """

    rng: np.random.Generator
    chips: int
    earlier: list[np.ndarray]
    others: np.ndarray
    enough: int


def every_word(view: View) -> np.ndarray:
    """Marks many words that it drew itself, all at once."""
    return view.rng.choice([-1.0, 1.0], (_WORDS, view.chips)).sum(axis=0)


def one_sign(view: View) -> np.ndarray:
    """Marks each segment with variant +."""
    return np.ones(view.chips)


def chosen_variants(view: View) -> np.ndarray:
    """Chooses a variant of each segment itself."""
    return view.rng.choice([-1.0, 1.0], view.chips)


def others_words(view: View) -> np.ndarray:
    """Adapts to what other customers opened: their mean, and more weight where they agree."""
    mean = view.others.mean(axis=0)
    return np.sign(mean) * mean**2


def earlier_words(view: View) -> np.ndarray:
    """Marks what this customer opened before."""
    return np.sum(view.earlier, axis=0) if view.earlier else one_sign(view)


def few_segments(view: View) -> np.ndarray:
    """Marks as few segments as can convict, so that a guess is most likely to be right."""
    z = np.zeros(view.chips)
    z[view.rng.choice(view.chips, view.enough, replace=False)] = view.rng.choice([-1.0, 1.0], view.enough)
    return z


def own_decoder(view: View) -> np.ndarray:
    """Of heavy-tailed suspects, names that whose largest readings have most of the power."""
    drawn = view.rng.standard_cauchy((_SUSPECTS, view.chips))
    powers = np.sort(drawn**2, axis=1)
    share = powers[:, -view.enough :].sum(axis=1) / powers.sum(axis=1)
    return drawn[share.argmax()]


STRATEGIES: dict[str, Callable[[View], np.ndarray]] = {
    "every word at once": every_word,
    "one sign everywhere": one_sign,
    "variants of its choice": chosen_variants,
    "other customers' opened words": others_words,
    "the same customer's earlier words": earlier_words,
    "as few segments as convict": few_segments,
    "own decoder, heavy tails": own_decoder,
}


def enough(alpha: float, num_parts: int, attempt: int) -> int:
    """The least k for which k segments that all agree convict: their p-value is 2^(1 - k) before its factors."""
    return math.ceil(1 + math.log2(num_parts * attempt * (attempt + 1) / alpha))


class Spoiled(NamedTuple):
    """How an owner who spoils packages ended.

    Attributes:
      attempts: words that the customer drew.
      survived: whether the last one survived.
      convicted: whether it then convicts.
    """

    attempts: int
    survived: bool
    convicted: bool


def spoil(
    rng: np.random.Generator, chips: int, num_parts: int, alpha: float, attempts: int, counted: bool = True
) -> Spoiled:
    """Spoils one variant of just enough segments of a part, until a customer's word has taken the others.

    Args:
      rng: chance of both.
      chips: segments of a part.
      num_parts: parts of the word.
      alpha: level of conviction.
      attempts: how many packages the customer asks for at most.
      counted: whether convictions pay for attempts; the control does not.
    """
    for attempt in range(1, attempts + 1):
        paid = attempt if counted else 1
        size = enough(alpha, num_parts, paid)
        kept = rng.choice([-1, 1], size)
        word = rng.choice([-1, 1], chips).astype(np.int8)
        if (word[:size] == kept).all():
            z = np.concatenate([kept, np.zeros(chips - size)])
            found = conviction.test(z, word, num_parts, paid, chips * num_parts)
            return Spoiled(attempt, True, found.log10_p <= math.log10(alpha))
    return Spoiled(attempts, False, False)
