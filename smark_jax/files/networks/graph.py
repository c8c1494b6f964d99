"""A network as its file holds it, and the function that it computes, as a pure function of JAX."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from smark_jax import _roles, _trees, _validate
from smark_jax.errors import SmarkError, Unreadable
from smark_jax.files import _limits
from smark_jax.files._limits import shown
from smark_jax.files._places import Place, Places, Unwritable

MAX_NODES = 50_000
_MAX_ARGUMENTS = 2**12
# The most values in a result, per image, and in one that depends on no image: a hostile graph may ask for any number.
_MAX_VALUES, _MAX_STATIC = 2**26, 2**22
# What functions of NumPy and JAX raise on arguments that they cannot handle.
_MISUSE = (ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError)

Operators = Mapping[str, Callable[..., Any]]
"""Functions of arrays by operator. Arrays known without weights and images come as NumPy arrays, and so stay static."""


class Value(NamedTuple):
    """A reference to an input of the graph, a tensor or a result of a node."""

    name: str


class Node(NamedTuple):
    """One operation: ``outputs = op(*arguments, **settings)``, where each :class:`Value` stands for its array."""

    op: str
    name: str
    arguments: tuple[Any, ...]
    settings: Mapping[str, Any]
    outputs: tuple[str, ...]


class Tensor(NamedTuple):
    """A tensor of the file.

    Attributes:
      array: its numbers, or why they are none.
      place: where they lie in the file, or why they cannot be written there.
    """

    array: np.ndarray | _limits.Foreign
    place: Place | Unwritable = Unwritable.PACKED


class Graph(NamedTuple):
    """A network.

    Attributes:
      nodes: all operations, each after those whose results it takes.
      tensors: by the name that nodes use.
      leaves: the name in the tree of weights, for each tensor that belongs there: weights and running statistics.
      image: the name of the one input that is no tensor.
      shape: its shape, None where any length fits; empty where the file does not tell it.
      output: the name of the result.
    """

    nodes: tuple[Node, ...]
    tensors: Mapping[str, Tensor]
    leaves: Mapping[str, str]
    image: str
    shape: tuple[int | None, ...]
    output: str

    @property
    def params(self) -> dict[str, np.ndarray]:
        """The tree of weights and running statistics."""
        return {leaf: self.array(name) for name, leaf in self.leaves.items()}

    def array(self, name: str) -> np.ndarray:
        """A tensor's numbers."""
        array = self.tensors[name].array
        if isinstance(array, _limits.Foreign):
            raise Unreadable(*array)
        return array


def leaf_name(name: str, carries: bool) -> str:
    """A tensor's name as a leaf: what does not carry says so by its own name, or stands under ``buffers``."""
    role = _roles.of_name(name)
    return name if carries or (role is not None and not role.carries) else f"buffers/{name}"


def all_leaves(tensors: Mapping[str, Tensor], leaves: Mapping[str, str]) -> dict[str, np.ndarray | _limits.Foreign]:
    """Every tensor of a file by its name as a leaf; those that the network's function does not take do not carry."""
    return {name: tensor.array for name, tensor in _by_leaf(tensors, leaves).items()}


def all_places(tensors: Mapping[str, Tensor], leaves: Mapping[str, str]) -> Places:
    """The places of those tensors of :func:`all_leaves` that are arrays."""
    found = _by_leaf(tensors, leaves)
    return {name: tensor.place for name, tensor in found.items() if not isinstance(tensor.array, _limits.Foreign)}


def _by_leaf(tensors: Mapping[str, Tensor], leaves: Mapping[str, str]) -> dict[str, Tensor]:
    names = {name: leaves.get(name) or leaf_name(name, carries=False) for name in tensors}
    _limits.check_names(names.values())
    if len(set(names.values())) < len(names):
        raise Unreadable("two of its tensors have the same name", "Export the network again.")
    return {names[name]: tensor for name, tensor in tensors.items()}


def references(value: Any) -> list[str]:
    """The names of all values in an argument."""
    if isinstance(value, Value):
        return [value.name]
    return [name for part in value for name in references(part)] if isinstance(value, list) else []


def needed(graph: Graph) -> Graph:
    """The graph without the nodes on which the result does not depend.

    Raises:
      Unreadable: when a node takes what nothing before it makes.
    """
    known = {graph.image, *graph.tensors}
    for node in graph.nodes:
        taken = references([*node.arguments, *node.settings.values()])
        if len(taken) > _MAX_ARGUMENTS:
            raise Unreadable(f"node {shown(node.name)} takes more than {_MAX_ARGUMENTS:,} values", _AGAIN)
        missing = next((name for name in taken if name not in known), None)
        if missing is not None:
            raise Unreadable(f"node {shown(node.name)} takes {shown(missing)}, which nothing before it makes", _AGAIN)
        known.update(node.outputs)
    if graph.output not in known:
        raise Unreadable(f"its result {shown(graph.output)} is made by no node", _AGAIN)
    wanted, kept = {graph.output}, []
    for node in reversed(graph.nodes):
        if wanted.intersection(node.outputs):
            kept.append(node)
            wanted.update(references([*node.arguments, *node.settings.values()]))
    return graph._replace(nodes=tuple(reversed(kept)))


_AGAIN = "The file is damaged: export the network again."


def without_softmax(graph: Graph, softmax: str, quantisers: Sequence[str] = ()) -> Graph:
    """The graph without a softmax at its end, so that its result is logits; nodes of ``quantisers`` may follow it."""
    result = graph.output
    for node in reversed(graph.nodes):
        given = node.arguments[0] if node.arguments else None
        if node.outputs[:1] == (result,) and isinstance(given, Value) and node.op in (softmax, *quantisers):
            result = given.name
            if node.op == softmax:
                return graph._replace(output=result)
    return graph


def function(graph: Graph, operators: Operators) -> Callable[[Mapping[str, Any], Any], Any]:
    """The function ``apply_fn(params, images)`` of a graph: pure, compiled, and a plain list of operations in a jaxpr.

    Raises:
      SmarkError: when an operator is not among ``operators``.
    """
    import jax

    unknown = next((node for node in graph.nodes if node.op not in operators), None)
    if unknown is not None:
        others = sorted({node.op for node in graph.nodes if node.op not in operators} - {unknown.op})
        more = f", and {', '.join(map(shown, others[:8]))}" if others else ""
        cause = "Write the network as a function of JAX of the weights that files.read returns."
        got = f"{shown(unknown.op)} in node {shown(unknown.name)}{more}"
        raise _validate.fail("network", "supported operators", got, cause)
    used = {name for node in graph.nodes for name in references([*node.arguments, *node.settings.values()])}
    constants = {name: graph.array(name) for name in used & (graph.tensors.keys() - graph.leaves.keys())}
    leaves = {name: leaf for name, leaf in graph.leaves.items() if name in used}

    def run(params: Mapping[str, Any], images: Any) -> Any:
        values = {**constants, **{name: params[leaf] for name, leaf in leaves.items()}, graph.image: images}
        for node in graph.nodes:
            values.update(zip(node.outputs, _results(node, operators, values, images.shape[0]), strict=False))
        return values[graph.output]

    def grouped(params: Mapping[str, Any], images: Any) -> Any:
        _check_call(graph.shape, leaves, params, np.shape(images))
        fixed = graph.shape[0] if graph.shape else None
        if fixed is None or fixed == images.shape[0]:
            return run(params, images)
        groups = images.reshape(images.shape[0] // fixed, fixed, *images.shape[1:])
        logits = jax.vmap(run, (None, 0))(params, groups)
        return logits.reshape(images.shape[0], *logits.shape[2:])

    jitted = jax.jit(grouped)

    def apply_fn(params: Mapping[str, Any], images: Any) -> Any:
        params = _trees.named("network", params)  # of a nested tree too: the names of leaves hold slashes
        # Under a caller's jit its operations are the caller's; else they are compiled, so that sizes are known first.
        return (grouped if _validate.is_traced(params, images) else jitted)(params, images)

    return apply_fn


def _check_call(
    shape: tuple[int | None, ...], leaves: Mapping[str, str], params: Mapping[str, Any], images: tuple[int, ...]
) -> None:
    """Refuses weights or images that the graph cannot take."""
    missing = next((leaf for leaf in leaves.values() if leaf not in params), None)
    if missing is not None:
        cause = "Pass the params that files.network returned, or others of their names."
        raise _validate.fail("network", f"the leaf {shown(missing)} among params", "none", cause)
    if not shape:
        return
    fits = len(images) == len(shape) and all(n in (None, m) for n, m in zip(shape[1:], images[1:], strict=True))
    if not fits or (shape[0] and images[0] % shape[0]):
        said = " ".join("any" if n is None else str(n) for n in shape)
        whole = f", or a multiple of {shape[0]} such images" if shape[0] else ""
        cause = (
            "The graph decides on the size and on the order of axes: PyTorch's take channels before height and width."
        )
        raise _validate.fail("network", f"images of shape [{said}]{whole}", f"shape {list(images)}", cause)


def _results(node: Node, operators: Operators, values: Mapping[str, Any], batch: int) -> tuple[Any, ...]:
    """What a node computes."""
    try:
        settings = {name: _filled(value, values) for name, value in node.settings.items()}
        with np.errstate(all="ignore"):
            found = operators[node.op](*(_filled(value, values) for value in node.arguments), **settings)
    except _MISUSE as error:
        if isinstance(error, SmarkError):
            raise
        got = f"in node {shown(node.name)} ({shown(node.op)}): {shown(str(error).partition(chr(10))[0])}"
        cause = "Does it use a setting that is not supported, or a shape that depends on an image?"
        raise _validate.fail("network", "nodes that can be computed", got, cause) from error
    results = tuple(found) if isinstance(found, tuple | list) else (found,)
    for result in results:
        most = _MAX_STATIC if isinstance(result, np.ndarray) else _MAX_VALUES * max(batch, 1)
        if math.prod(np.shape(result)) > most:
            got = f"an array of shape {np.shape(result)} from node {shown(node.name)} ({shown(node.op)})"
            cause = "Is the file damaged, or are the images far larger than usual?"
            raise _validate.fail("network", f"at most {most:,} values in a result", got, cause)
    return results


def _filled(value: Any, values: Mapping[str, Any]) -> Any:
    """An argument with arrays in place of references."""
    if isinstance(value, Value):
        return values[value.name]
    return [_filled(part, values) for part in value] if isinstance(value, list) else value
