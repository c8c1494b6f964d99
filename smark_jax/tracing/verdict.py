"""The verdict: p-values and their corrections, and decoys."""

import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int8

from smark_jax import _processes, _validate, codes, keys, statistics
from smark_jax._types import AnyArray
from smark_jax.tracing import decoders, scoring
from smark_jax.tracing.decoys import Decoys, score_decoys

OnProgress = Callable[[int, int], None]
"""``on_progress(done, total)``: customers scored so far, and their total number."""

NUM_DECOYS = 1024
_SUSPECTS_PER_PASS = 16


class Accusation(NamedTuple):
    """One accused customer.

    Attributes:
      serial: the customer's number in the owner's registry.
      statistic: T, signed: about sqrt(m) for an intact copy; negative when colluders extrapolated away from it. Joint
        and sequential decoding compute it on the residual that others' codewords leave.
      p_value: bound on the probability of so large an absolute T for any innocent customer, corrected for customers,
        suspects and alignments. Never 0: it is at least the smallest float, while ``log10_p`` has no such limit.
      log10_p: its logarithm to base 10, exact at any size.
      share: this customer's share in the coalition as estimated from the accused, 0 to 1.
    """

    serial: int
    statistic: float
    p_value: float
    log10_p: float
    share: float


class Verdict(NamedTuple):
    """The result of :func:`trace`.

    Attributes:
      accused: the accused, most significant first; empty when nobody is.
      alpha: bound on the probability of accusing any innocent customer.
      num_customers: N, for which every p-value is corrected.
      statistics: T of every customer in the order of the codebook, float32, shape [N]; empty when not kept. For
        customers that joint or sequential decoding tested, it is the statistic of that test.
      threshold: the absolute T from which a customer alone is accused; infinite when there are too few chips for alpha.
      decoder: the decoder's name.
      num_suspects: suspects examined together, for which every p-value is corrected as well.
      num_alignments: alignments tried for each suspect, likewise.
      decoys: the scores of codewords that nobody received.
      log_maps: natural logarithm of the number of maps of leaves among which the suspect's was chosen; p-values are
        corrected for it as well.
    """

    accused: tuple[Accusation, ...]
    alpha: float
    num_customers: int
    statistics: Float[np.ndarray, " N"]
    threshold: float
    decoder: str
    num_suspects: int
    num_alignments: int
    decoys: Decoys
    log_maps: float = 0.0

    @property
    def assumptions(self) -> str:
        """A statement of what the probability bound assumes and counts."""
        return (
            f"The probability that this accuses any innocent customer is at most {self.alpha:g}, whatever was done to "
            f"the model, counting {self.num_customers:,} customers, {self.num_suspects:,} suspects and "
            f"{self.num_alignments:,} alignments of each{self._maps}. It assumes that codewords are independent fair "
            "signs from a secret key and were never chosen among several; that the innocents' codewords stayed secret, "
            "and carrier, alignment and choice of layers did not depend on them; and that decoder and level were fixed "
            "beforehand. It does not cover somebody who holds the code key."
        )

    @property
    def _maps(self) -> str:
        return f", and 10^{self.log_maps / math.log(10):.1f} maps of its leaves" if self.log_maps else ""


def trace(
    chips: Float[AnyArray, " m"],
    codebook: Int8[AnyArray, "K m"] | codes.Codebook,
    alpha: float = 1e-6,
    decoder: str = "joint",
    *,
    serials: Sequence[int] | None = None,
    num_suspects: int = 1,
    num_alignments: int = 1,
    keep_statistics: bool = True,
    on_progress: OnProgress | None = None,
    collective: bool = False,
) -> Verdict:
    """Accuses the customers whose codewords the chips carry; the probability of a false accusation is at most alpha.

    Args:
      chips: the suspect's read-out y, shape [m], as from :func:`smark_jax.extraction.extract`.
      codebook: every customer who might be accused: words of -1 and +1, shape [K, m], or a streamed
        :class:`~smark_jax.codes.Codebook`. Leaving customers out, or trying several codebooks, breaks the guarantee.
      alpha: bound on the probability of accusing anybody innocent.
      decoder: a name in :data:`smark_jax.tracing.DECODERS`. ``"joint"`` (T2) finds coalitions; ``"sequential"`` (T3)
        is cheaper and finds fewer; ``"single"`` tests each customer alone, T_j = <y, b_j> / norm(y).
      serials: the customers' serials in the order of the codebook's rows, if it is an array; by default the row
        numbers, which is right only when customers are numbered from 0.
      num_suspects: how many suspects are examined on this occasion; :func:`trace_batch` counts them itself.
      num_alignments: how many alignments of the suspect were tried.
      keep_statistics: whether the verdict holds every customer's statistic.
      on_progress: called several times in a long pass, with the customers scored so far and their total number.
      collective: whether all processes of ``jax.distributed`` make this very call. Then each scores a share of the
        customers, and all get the whole verdict.

    Returns:
      The verdict. Chips of zero (the base model itself) accuse nobody.

      Peak memory besides the codebook: about 100 MB for the pass; ``4 N`` bytes for kept statistics; for joint decoding
      40 MB of packed words, and ``4 L`` bytes for each selected customer and about 20 more, with L = min(N, 320e6 / m).

    Raises:
      SmarkError: on chips that are not a finite vector, a codebook of another length or with entries other than -1 and
        +1, no customers, serials that do not match, alpha outside (0, 1), or an unknown decoder.

    Warns:
      RuntimeWarning: when a decoy stands out, which no sound verdict shows.

    Examples:
      >>> from smark_jax import codes, keys, tracing
      >>> words = codes.codebook(keys.from_bytes(bytes(32)), range(1000))
      >>> mixed = (words[42] + 2.0 * words[7]) / 3
      >>> sorted(accusation.serial for accusation in tracing.trace(mixed, words).accused)
      [7, 42]
    """
    y = _validate.chips("trace", chips)
    case = _case(codebook, alpha, decoder, serials, num_suspects, num_alignments, y.size, collective)
    return _trace_rows(y[None], case, keep_statistics, np.zeros(1), _counter(case.num_customers, on_progress))[0]


def trace_batch(
    chips: Float[AnyArray, "M m"],
    codebook: Int8[AnyArray, "K m"] | codes.Codebook,
    alpha: float = 1e-6,
    decoder: str = "joint",
    *,
    serials: Sequence[int] | None = None,
    num_alignments: int = 1,
    log_maps: Sequence[float] | None = None,
    keep_statistics: bool = True,
    on_progress: OnProgress | None = None,
    collective: bool = False,
) -> tuple[Verdict, ...]:
    """:func:`trace` for M suspects together: one pass over the codebook serves many, and all p-values count all M.

    Args:
      chips: the suspects' read-outs, shape [M, m], as from :func:`smark_jax.extraction.extract_batch`.
      codebook: as for :func:`trace`.
      alpha: bound on the probability of any false accusation in any of the M verdicts.
      decoder: as for :func:`trace`.
      serials: as for :func:`trace`.
      num_alignments: how many alignments of each suspect were tried.
      log_maps: for each suspect, the natural logarithm of the number of maps of its leaves from which a person chose
        one (:attr:`smark_jax.files.Layout.log_maps`); p-values are corrected for it. By default nobody chose.
      keep_statistics: whether each verdict holds every customer's statistic, ``4 N M`` bytes in all.
      on_progress: as for :func:`trace`; every pass over the codebook counts all customers.
      collective: as for :func:`trace`.

    Returns:
      A verdict for each suspect.

    Raises:
      SmarkError: as :func:`trace`.
    """
    if np.ndim(chips) != 2 or np.shape(chips)[0] == 0:
        cause = "For a single suspect use trace."
        raise _validate.fail("trace_batch", "chips of shape [M, m] with M >= 1", f"shape {np.shape(chips)}", cause)
    y = np.stack([_validate.chips("trace_batch", row) for row in np.asarray(chips)])
    case = _case(codebook, alpha, decoder, serials, len(y), num_alignments, y.shape[1], collective)
    maps = np.zeros(len(y)) if log_maps is None else np.asarray(log_maps, np.float64)
    if maps.shape != (len(y),) or not (np.isfinite(maps) & (maps >= 0)).all():
        got = f"shape {maps.shape}, smallest {maps.min(initial=math.inf):g}"
        cause = "It is 0 where nobody chose a map."
        raise _validate.fail("trace_batch", "a logarithm of at least 0 for each suspect", got, cause)
    passes = range(0, len(y), _SUSPECTS_PER_PASS)
    on_scored, verdicts = _counter(len(passes) * case.num_customers, on_progress), []
    for start in passes:
        rows = slice(start, start + _SUSPECTS_PER_PASS)
        verdicts += _trace_rows(y[rows], case, keep_statistics, maps[rows], on_scored)
    return tuple(verdicts)


def _counter(total: int, on_progress: OnProgress | None) -> Callable[[int], None]:
    """Adds up the customers that the passes over the codebook have scored."""
    counts = [0]

    def on_scored(count: int) -> None:
        counts[0] += count
        if on_progress is not None:
            on_progress(counts[0], total)

    return on_scored


class _Case(NamedTuple):
    """The validated settings that all suspects of one call share."""

    book: scoring.Book
    alpha: float
    decoder: str
    serials: np.ndarray | None
    num_customers: int
    num_suspects: int
    num_alignments: int
    decoys: Float[np.ndarray, "D m"]
    collective: bool

    @property
    def log_level(self) -> float:
        """Logarithm of the level at which one suspect's customers are tested, before the correction for N."""
        return math.log(self.alpha) - math.log(self.num_suspects) - math.log(self.num_alignments)


def _case(
    book: scoring.Book,
    alpha: float,
    decoder: str,
    serials: Sequence[int] | None,
    num_suspects: int,
    num_alignments: int,
    num_chips: int,
    collective: bool,
) -> _Case:
    _validate.probability("trace", "alpha", alpha)
    _validate.positive("trace", "num_suspects", num_suspects)
    _validate.positive("trace", "num_alignments", num_alignments)
    if decoder not in decoders.DECODERS:
        names = ", ".join(map(repr, decoders.DECODERS))
        raise _validate.fail("trace", f"a decoder of {names}", repr(decoder), "Is the name spelt right?")
    scoring.check(book)
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
    decoys = np.asarray(decoys, np.float64)
    return _Case(book, alpha, decoder, numbers, num_customers, num_suspects, num_alignments, decoys, collective)


def _trace_rows(
    y: Float[np.ndarray, "R m"],
    case: _Case,
    keep: bool,
    log_maps: Float[np.ndarray, " R"],
    on_scored: Callable[[int], None],
) -> list[Verdict]:
    directions = np.stack([statistics.direction(row) for row in y])
    log_levels = case.log_level - math.log(case.num_customers) - log_maps
    levels = np.array(
        [statistics.threshold(u, level) for u, level in zip(directions, log_levels.tolist(), strict=True)]
    )
    margin = decoders.DECODERS[case.decoder].margin
    floors = np.zeros(len(y)) if margin is None else levels - margin
    if case.collective:  # decoys follow from the codebook
        inputs = (directions, levels, case.decoys, np.array([case.num_customers, keep]))
        content = case.decoder.encode() + b"".join(array.tobytes() for array in inputs)
        _processes.same("trace", "chips, codebook and settings", content, "Every process must trace the same suspects.")
    scores = scoring.score(directions, case.book, floors, keep, on_scored, collective=case.collective)
    kept = scores.all if scores.all is not None else np.empty((len(y), 0), np.float32)
    rows = zip(directions, levels.tolist(), scores.best, scores.best_scores, kept, log_maps.tolist(), strict=True)
    return [_verdict(u, level, best, best_scores, row, maps, case) for u, level, best, best_scores, row, maps in rows]


def _verdict(
    u: Float[np.ndarray, " m"],
    level: float,
    best: np.ndarray,
    best_scores: Float[np.ndarray, " L"],
    kept: Float[np.ndarray, " N"],
    log_maps: float,
    case: _Case,
) -> Verdict:
    tests, rest = [], u
    if u.any():
        near = decoders.Near(u, case.book, best, best_scores, case.num_customers)
        tests, rest = decoders.DECODERS[case.decoder].decode(near)
    accused = [test for test in tests if test.log_p + log_maps <= case.log_level]
    shares = _shares(u, [test.customer for test in accused], case)
    if kept.size:
        kept[[test.customer for test in tests]] = [test.statistic for test in tests]
    return Verdict(
        accused=tuple(_accusation(test, shares, log_maps, case) for test in accused),
        alpha=float(case.alpha),
        num_customers=case.num_customers,
        statistics=kept,
        threshold=level,
        decoder=case.decoder,
        num_suspects=case.num_suspects,
        num_alignments=case.num_alignments,
        decoys=score_decoys(rest, case.decoys),
        log_maps=log_maps,
    )


def _shares(u: Float[np.ndarray, " m"], customers: list[int], case: _Case) -> dict[int, float]:
    """The shares of the accused: least-squares coefficients of the read-out on their words, in absolute value."""
    words = scoring.rows(case.book, np.array(customers, np.int64)).astype(np.float64)
    return dict(zip(customers, np.abs(np.linalg.lstsq(words.T, u, rcond=None)[0]).tolist(), strict=True))


def _accusation(test: decoders.Test, shares: dict[int, float], log_maps: float, case: _Case) -> Accusation:
    log_p = min(0.0, test.log_p + math.log(case.num_suspects) + math.log(case.num_alignments) + log_maps)
    return Accusation(
        serial=int(case.serials[test.customer]) if case.serials is not None else test.customer,
        statistic=test.statistic,
        p_value=max(math.exp(log_p), sys.float_info.min),
        log10_p=log_p / math.log(10),
        share=float(shares[test.customer] / sum(shares.values())),
    )
