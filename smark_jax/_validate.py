"""Checks of user input: each failure says who refused, what was expected, what it got, and the likely cause."""

import contextlib
import math
import numbers
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from smark_jax import _foreign, errors

if TYPE_CHECKING:
    import numpy as np

# JAX and NumPy are loaded by the functions that need them: commands that check no array start without.
PyTree = Any  # as _types.PyTree, which comes with jax


Kind = TypeVar("Kind", bound=errors.SmarkError)


def fail(
    who: str, expected: str, got: str, cause: str, *, kind: type[Kind] = errors.SmarkError, desk: str | None = None
) -> Kind:
    """An error whose message has the project's common form; the caller raises it.

    The message always has two lines, whatever its parts contain: untrusted text cannot start a line of its own.

    Args:
      who: the function or command that refuses; omitted at the command line, where the command is known.
      expected: what would have been right.
      got: what was passed instead.
      cause: the likely cause, or what to do next, for a reader who calls functions.
      kind: the class of the error, where callers distinguish classes.
      desk: the cause for a reader at the command line, where ``cause`` speaks of functions or arguments.
    """
    expected, got, cause, desk = map(_foreign.clean, (expected, got, cause, cause if desk is None else desk))
    said = f"expected {expected}, but got {got}."
    return kind(f"{who}: {said}\n{cause}", desk=f"{said}\n{desk}")


def is_traced(*values: Any) -> bool:
    """True under jit, vmap or grad, where shapes are known and values are not."""
    import jax
    from jax import core

    return any(isinstance(leaf, core.Tracer) for leaf in jax.tree.leaves(values))


def same_shape(who: str, **named: Any) -> None:
    """Refuses arrays whose shapes differ."""
    import numpy as np

    shapes = {name: np.shape(value) for name, value in named.items()}
    if len(set(shapes.values())) > 1:
        got = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise fail(who, "equal shapes", got, "Were they made with different numbers of chips?")


def vector(who: str, name: str, value: Any, length: int, cause: str) -> None:
    """Refuses anything but a vector of ``length`` entries."""
    import numpy as np

    if np.shape(value) != (length,):
        raise fail(who, f"{name} of shape ({length:,},)", f"shape {np.shape(value)}", cause)


def positive(who: str, name: str, value: int) -> None:
    """Refuses a count that is not a whole number of at least one."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise fail(
            who, f"{name} to be a whole number of at least 1", repr(value), "It counts something: 1, 2, 3 and so on."
        )


def probability(who: str, name: str, value: float) -> None:
    """Refuses a level outside the open interval (0, 1)."""
    import numpy as np

    if isinstance(value, str) or np.ndim(value) != 0 or not 0 < float(value) < 1:
        raise fail(
            who,
            f"{name} strictly between 0 and 1",
            repr(value),
            f"{name} bounds the probability of accusing anybody innocent: choose a small one, such as 1e-6.",
        )


def unit_interval(who: str, name: str, value: float, cause: str) -> None:
    """Refuses a number outside the open interval (0, 1)."""
    if not is_traced(value) and not 0 < value < 1:
        raise fail(who, f"{name} strictly between 0 and 1", repr(value), cause)


def finite_number(who: str, name: str, value: float) -> None:
    """Refuses a strength, clip or margin that is not a positive finite number."""
    import numpy as np

    if is_traced(value):
        return
    if not (np.ndim(value) == 0 and math.isfinite(value) and value > 0):
        raise fail(
            who,
            f"{name} to be a positive finite number",
            repr(value),
            "Zero, negative numbers, NaN and infinity have no meaning here.",
        )


def all_finite(who: str, what: str, ok: Any) -> None:
    """Refuses when ``ok``, a device boolean computed with the result, is false. Skipped under jit, vmap and grad."""
    if not is_traced(ok) and not bool(ok):
        raise fail(who, f"finite {what}", "NaN or infinite values", "Did training diverge, or is the file damaged?")


@contextlib.contextmanager
def needs(who: str, extra: str) -> Iterator[None]:
    """Wraps imports of packages that belong to an extra of smark-jax: the error says how to install it.

    Args:
      who: the function or command that needs them.
      extra: its name, as in ``pip install 'smark-jax[extra]'``.

    Raises:
      MissingExtra: when one of them is not installed.
    """
    try:
        yield
    except ImportError as error:
        install = f"Install it: pip install 'smark-jax[{extra}]'"
        got = "an installation without it"
        found = fail(who, f"the package {error.name}", got, install, kind=errors.MissingExtra)
        found.extra, found.name = extra, error.name
        raise found from error


def chips(who: str, value: Any) -> "np.ndarray":
    """Returns a read-out as a float64 vector on the host, or refuses it."""
    import numpy as np

    array = np.asarray(value, np.float64)
    if array.ndim != 1 or array.size == 0:
        raise fail(who, "chips of shape [m]", f"shape {array.shape}", "For several suspects, trace one row at a time.")
    all_finite(who, "chips", np.isfinite(array).all())
    return array


def serials(who: str, value: Any) -> "np.ndarray":
    """Returns customers' serials as int64 [K], or refuses duplicates, negatives and non-integers."""
    import numpy as np

    array = np.asarray(value)
    if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise fail(
            who,
            "serials to be a non-empty vector of whole numbers",
            f"shape {array.shape}, dtype {array.dtype}",
            "A serial is the customer's number in the owner's registry.",
        )
    if array.min() < 0 or int(array.max()) >= 2**63:
        raise fail(who, "serials of 0 to 2^63 - 1", f"{array.min()} to {array.max()}", "Number customers from 0.")
    values, counts = np.unique(array, return_counts=True)
    if values.size < array.size:
        twice = values[counts > 1][:3].tolist()
        raise fail(who, "distinct serials", f"duplicates of {twice}", "Two customers must never share a codeword.")
    return array.astype(np.int64)


def stacked(who: str, name: str, trees: PyTree) -> int:
    """The length of the leading axis that all leaves share, or an error when there is no such axis."""
    import jax
    import numpy as np

    axes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(trees)}
    if len(axes) != 1 or axes == {()} or axes == {(0,)}:
        raise fail(
            who,
            f"{name} whose leaves share a leading axis of at least one",
            f"leading axes {sorted(axes)}" if axes else "no leaves",
            "Stack trees with jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees).",
        )
    return axes.pop()[0]


def class_numbers(who: str, labels: "np.ndarray", classes: int) -> None:
    """Requires labels from 0 to ``classes`` - 1."""
    import numpy as np

    whole = labels.dtype.kind in "iuf" and (labels == np.floor(labels)).all()
    if not whole or labels.min() < 0 or labels.max() >= classes:
        got = f"{labels.min()} to {labels.max()}" if whole else f"dtype {labels.dtype}"
        cause = "Are the labels of these images, counted from 0?"
        raise fail(who, f"labels as class numbers, 0 to {classes - 1}", got, cause)
