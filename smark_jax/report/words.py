"""Numbers, names and dates as the report words them: never more certain or more precise than the verdict."""

import datetime
import math

from smark_jax import _foreign

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_MONTHS = (
    "January February March April May June July August September October November December".split()
)  # strftime would use the machine's language


def power(exponent: int) -> str:
    """A power of ten with raised digits, which survive copying: 10⁷² rather than 1072."""
    return "10" + str(exponent).translate(_SUPERSCRIPT)


def one_in(log10_p: float) -> str:
    """The probability bound as odds, rounded to the weaker side: ``-72.4`` gives ``1 in 10⁷²``.

    Args:
      log10_p: logarithm to base 10 of the bound, at most 0.
    """
    if not log10_p < 0:
        return "1 in 1"
    # The small tolerance corrects float rounding, so that 1e-6 gives one in 1,000,000 and not one in 999,999.
    if log10_p > -6:
        return f"1 in {math.floor(10**-log10_p * (1 + 1e-9)):,}"
    exponent = math.floor(-log10_p + 1e-9)
    return f"1 in {10**exponent:,}" if exponent <= 9 else f"1 in {power(exponent)}"


def spelt_out(log10_p: float) -> str:
    """A power of ten in words, for readers not used to them; empty for numbers that are written in full."""
    exponent = math.floor(-log10_p + 1e-9)
    return f"a one followed by {exponent} zeros" if exponent > 9 else ""


def at_most(log10_p: float) -> str:
    """The bound as it appears in a table: ``≤ 10⁻⁷²``."""
    if log10_p > -6:
        return f"≤ {10**log10_p:.2g}"
    return f"≤ {power(-math.floor(-log10_p + 1e-9))}"


def number(value: float) -> str:
    """A signed statistic with one decimal, and a true minus sign."""
    return f"{value:+.1f}".replace("-", "−") if math.isfinite(value) else "not defined"


def date(created: str) -> str:
    """An ISO time stamp as ``25 November 2026, 18:00 UTC``; any other text is shown unchanged."""
    try:
        moment = datetime.datetime.fromisoformat(created)
    except (TypeError, ValueError):
        return _foreign.clean(created)
    if moment.tzinfo is None:
        return _foreign.clean(created)
    moment = moment.astimezone(datetime.UTC)
    return f"{moment.day} {_MONTHS[moment.month - 1]} {moment.year}, {moment:%H:%M} UTC"


def count(number: int, noun: str) -> str:
    """``1 customer``, ``20 customers``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def listed(names: list[str]) -> str:
    """``A``, ``A and B``, ``A, B and C``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
