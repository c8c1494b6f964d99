"""Expressions that are alike but for the weights in them: two branches of a network that may change places.

Where the values of two such expressions are added, multiplied, compared or put side by side, a suspect may hold the
weights of one in the leaves of the other: the towers of an ensemble, the parts of a maxout unit, experts, heads with
leaves of their own. No axis of a leaf shows that. The same holds for a value and its negative (CReLU), since a change
of sign of the weights that make it exchanges the two.
"""

import itertools
from collections.abc import Hashable, Sequence
from typing import Any

from smark_jax.alignment._identities import Form, Identities, Value

_COMMUTE = frozenset("add add_any mul max min concatenate stack".split())
_SUMS = frozenset("add add_any sub".split())
_SCALED = frozenset("add add_any sub mul div".split())
_VIEWS = frozenset("reshape broadcast_in_dim squeeze convert_element_type copy copy_p expand_dims".split())
_LINEAR = frozenset(
    """add add_any sub mul div neg convert_element_type copy copy_p optimization_barrier reduce_precision
    sharding_constraint stop_gradient reshape transpose squeeze broadcast_in_dim slice split concatenate pad gather rev
    dynamic_slice dot_general reduce_sum tile stack expand_dims""".split()
)
BRANCHES = "branches that may change places"
ALTERED = "weights that are computed from other weights"


class Forms:
    """Numbers for expressions: equal ones for equal expressions."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}

    def _number(self, *key: Hashable) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def known(self, *key: Hashable) -> Form:
        """The form of a value that nothing can change."""
        number = self._number(*key)
        return Form(number, number)

    def leaf(self, path: str, shape: tuple[int, ...]) -> Form:
        """The form of a leaf."""
        return Form(self._number("leaf", path), self._number("weights", shape))

    def of(self, walk: Identities, eqn: Any, operands: Sequence[Value]) -> list[Form]:
        """The forms of an equation's results; notes what is free beyond channels."""
        name = eqn.primitive.name
        name = "max" if name == "min" else name
        exact = self._number(name, _key(eqn.params), *(operand.form.exact for operand in operands))
        weights = [operand for operand in operands if operand.compute and operand.compute.paths]
        if all(operand.compute for operand in operands):
            exact = operands[0].form.exact if name in _VIEWS else exact
            return [
                Form(
                    exact if name in _VIEWS else self._number(exact, i),
                    self._number("weights", var.aval.shape) if weights else self._number(exact, i),
                    _is_matrix(var.aval.shape) and _alters(name, weights, eqn),
                )
                for i, var in enumerate(eqn.outvars)
            ]
        if any(operand.form.altered for operand in weights):
            walk.beyond[ALTERED] = None
        both = list(zip(operands, eqn.invars, strict=True))
        if name in _COMMUTE:
            pairs = itertools.combinations([operand.form for operand in operands], 2)
            if any(one.alike == other.alike and one.exact != other.exact for one, other in pairs):
                walk.beyond[BRANCHES] = None
        scalars = [operand.compute and not operand.compute.paths and not atom.aval.shape for operand, atom in both]
        if name == "neg" or (name in _SCALED and any(scalars)):
            return [Form(exact, next(v for v, scalar in zip(operands, scalars, strict=True) if not scalar).form.alike)]
        params: Hashable = _key(eqn.params)
        alike = [operand.form.alike for operand in operands]
        moves = {axis for role in operands[0].roles if not walk.still(role) for axis in role.axes}
        if name in ("slice", "split") and all(n == m or a in moves for a, n, m in _cuts(eqn)):
            numbers = [self._number("some channels", var.aval.shape, *alike) for var in eqn.outvars]
            return [Form(self._number(exact, i), number) for i, number in enumerate(numbers)]
        alike = sorted(alike) if name in _COMMUTE and name != "concatenate" else alike
        number = self._number(name, params, *alike)
        return [Form(self._number(exact, i), self._number(number, i, "alike")) for i in range(len(eqn.outvars))]


def _cuts(eqn: Any) -> list[tuple[int, int, int]]:
    return [(a, n, m) for a, (n, m) in enumerate(zip(eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape, strict=True))]


def _is_matrix(shape: Sequence[int]) -> bool:
    return sum(size > 1 for size in shape) > 1


def _alters(name: str, weights: Sequence[Value], eqn: Any) -> bool:
    """Whether many matrices give the result: sums and products of several, and anything that is not linear."""
    if any(value.form.altered for value in weights):
        return True
    if name not in _LINEAR:
        return bool(weights)
    whole = [v for v, atom in zip(weights, eqn.invars, strict=False) if _is_matrix(atom.aval.shape)]
    return (name in ("mul", "div") and len(whole) > 1) or (name in _SUMS and len(weights) > 1)


def _key(params: dict[str, Any]) -> Hashable:
    found = tuple(sorted(params.items()))
    try:
        hash(found)
    except TypeError:
        return repr(found)
    return found
