"""Parameter trees, addressed by the names of their leaves.

A leaf's name is its pytree path, the steps joined by ``/``: ``Conv_0/kernel``. Files use the same names.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from smark_jax import _validate

PyTree = Any  # as _types.PyTree, which comes with jax; jax is loaded only where a tree is walked


def name(path: Any) -> str:
    """The name of the leaf at a pytree path."""
    import jax

    return jax.tree_util.keystr(path, simple=True, separator="/")


def names(tree: PyTree) -> list[str]:
    """The leaves' names, in the order of ``jax.tree.leaves``."""
    import jax

    return [name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def named(who: str, tree: PyTree) -> dict[str, Any]:
    """The leaves by name, in the order of ``jax.tree.leaves``.

    Raises:
      SmarkError: when two leaves have the same name; the message names ``who`` as the caller.
    """
    import jax

    found: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if (at := name(path)) in found:
            raise _validate.fail(who, "a path of its own for each leaf", f"{at!r} twice", "Is '/' part of a name?")
        found[at] = leaf
    return found


def map_named(function: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """The tree of ``function(name, leaf)``."""
    import jax

    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(name(path), leaf), tree)


def rebuilt(tree: PyTree, leaves: Mapping[str, Any]) -> PyTree:
    """A tree of the structure of ``tree`` with other leaves, taken by name."""
    import jax

    return jax.tree.unflatten(jax.tree.structure(tree), [leaves[leaf] for leaf in names(tree)])


def matching(who: str, tree: PyTree, match: str) -> PyTree:
    """A tree of the same structure that says of each leaf whether the regular expression is found in its name.

    Raises:
      SmarkError: when it is found in none; the message names ``who`` as the caller.
    """
    import jax

    chosen = map_named(lambda path, _: re.search(match, path) is not None, tree)
    if not any(jax.tree.leaves(chosen)):
        expected, paths = "a pattern found in a leaf's path", ", ".join(names(tree))
        raise _validate.fail(who, expected, repr(match), f"The paths are {paths}.")
    return chosen


def split(tree: PyTree, chosen: PyTree) -> tuple[PyTree, PyTree]:
    """Two trees that :func:`join` puts together again; each has None where the other has the leaf.

    Args:
      tree: any pytree.
      chosen: a tree of the same structure; true where the first result is to have the leaf.
    """
    import jax

    return (
        jax.tree.map(lambda leaf, first: leaf if first else None, tree, chosen),
        jax.tree.map(lambda leaf, first: None if first else leaf, tree, chosen),
    )


def join(first: PyTree, second: PyTree) -> PyTree:
    """The tree that :func:`split` took apart."""
    import jax

    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda leaf: leaf is None)


def same(who: str, trees: Mapping[int, PyTree] | Sequence[PyTree]) -> None:
    """Refuses parties' updates that differ in structure, leaf shape or dtype, naming the first party that differs."""
    import jax

    items = list(trees.items()) if isinstance(trees, Mapping) else list(enumerate(trees))
    if not items:
        raise _validate.fail(who, "updates of at least one party", "zero parties", "Did every party drop out?")

    def describe(tree: PyTree) -> dict[str, str]:
        leaves = named(who, tree).items()
        return {leaf: f"{np.shape(value)} {jax.numpy.result_type(value)}" for leaf, value in leaves}

    first_party, first_tree = items[0]
    first = describe(first_tree)
    for party, tree in items[1:]:
        other = describe(tree)
        if other == first:
            continue
        leaf = next(k for k in sorted(first.keys() | other.keys()) if first.get(k) != other.get(k))
        raise _validate.fail(
            who,
            f"the same tree from every party (leaf {leaf!r}: {first.get(leaf, 'absent')} at party {first_party})",
            f"{other.get(leaf, 'absent')} at party {party}",
            "Do all parties run the same model definition and precision?",
        )
