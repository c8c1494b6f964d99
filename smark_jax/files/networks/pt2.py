"""Reads what ``torch.export.save`` writes: a zip of a graph in JSON and of tensors as raw bytes; no pickle is loaded.

References:
  ``torch.export.save`` of PyTorch 2.9 and later; ``torch/_export/serde/schema.py`` for the graph.
"""

import json
import math
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from smark_jax.errors import Unreadable
from smark_jax.files import _limits, _zip
from smark_jax.files._limits import Foreign, shown
from smark_jax.files._places import Place, Places
from smark_jax.files._sources import Source
from smark_jax.files.networks import graph as graphs
from smark_jax.files.networks.graph import Graph, Node, Tensor, Value

# By the numbers of the schema's ScalarType.
DTYPES = {
    number: _limits.DTYPES[name]
    for number, name in {
        1: "U8", 2: "I8", 3: "I16", 4: "I32", 5: "I64", 6: "F16", 7: "F32", 8: "F64", 12: "BOOL", 13: "BF16",
    }.items()
}  # fmt: skip
_FLOATS = tuple(DTYPES[number] for number in (6, 7, 8, 13))
_GRAPH = "models/model.json"
_MAX_JSON = 32 * 2**20
_TENSORS = {"data/weights": "model_weights_config.json", "data/constants": "model_constants_config.json"}
_AGAIN = "The file is damaged, or written by another version of PyTorch: export the network again."
_ATEN = "torch.ops.aten."
# Results that share memory with their first argument: a change in place would show in both.
_VIEWS = frozenset(
    "view reshape flatten permute transpose t slice select squeeze unsqueeze expand split split_with_sizes chunk "
    "unbind alias detach contiguous to dropout".split()
)


def matches(data: bytes) -> bool:
    """Whether the content is a zip with the graph of an exported program."""
    return _zip.matches(data) and _root(_zip.opened(data)) is not None


def read(source: Source, max_bytes: int) -> dict[str, np.ndarray | Foreign]:
    """Parameters and buffers by name."""
    tensors, parameters = _tensors(_Members(source.data, max_bytes))
    return graphs.all_leaves(tensors, {name: name for name in parameters})


def places(source: Source) -> Places:
    """Where parameters and buffers lie, by name: those in members that are stored as they are."""
    tensors, parameters = _tensors(_Members(source.data, _limits.ANY_SIZE))
    return graphs.all_places(tensors, {name: name for name in parameters})


def load(source: Source, max_bytes: int) -> Graph:
    """The network in a file.

    Raises:
      Unreadable: when the content is no exported program of one input, or is beyond a limit.
    """
    members = _Members(source.data, max_bytes)
    tensors, parameters = _tensors(members)
    try:
        return _graph(members.json(_GRAPH), tensors, parameters)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(f"its graph is not as PyTorch writes it ({shown(str(error))})", _AGAIN) from None


def _root(archive: zipfile.ZipFile) -> str | None:
    """What the names of all members begin with: nothing, or the name of a folder and a slash."""
    found = [name.removesuffix(_GRAPH) for name in archive.namelist() if name.endswith(_GRAPH)]
    return found[0] if len(found) == 1 and found[0].count("/") <= 1 else None


class _Members:
    """The members of an archive; reading them takes ``max_bytes`` at most, however often one is read."""

    def __init__(self, data: bytes, max_bytes: int) -> None:
        self._archive = _zip.bounded(data, max_bytes)
        self.root, self._left = _root(self._archive) or "", max_bytes
        self._spans = _zip.spans(data)

    def start(self, name: str) -> int | None:
        """The byte of the file at which a member begins that is stored as it is; None if it is compressed."""
        span = self._spans.get(self.root + name)
        return None if span is None else span[0]

    def content(self, name: str) -> np.ndarray:
        """A member's bytes, by its name below the root; uint8."""
        try:
            info = self._archive.getinfo(self.root + name)
            self._left -= info.file_size
            if self._left < 0:
                raise _limits.too_large("reading its members takes more bytes than are allowed")
            with self._archive.open(info) as stream:
                return _zip.taken(stream, info.file_size, f"its member {shown(name)}")
        except Unreadable:
            raise
        except KeyError:
            raise Unreadable(f"it has no member {shown(name)}", _AGAIN) from None
        except _zip.DAMAGE as error:
            raise Unreadable(f"its member {shown(name)} is damaged ({shown(str(error))})", _zip.ADVICE) from None

    def json(self, name: str) -> Any:
        """The value in a member that is JSON."""
        text = self.content(name)
        if len(text) > _MAX_JSON:
            raise Unreadable(f"its member {shown(name)} has more than {_MAX_JSON:,} bytes", _AGAIN)
        try:
            return json.loads(_limits.json_text(text.tobytes()))
        except Unreadable:
            raise
        except (ValueError, RecursionError):
            raise Unreadable(f"its member {shown(name)} is not JSON", _AGAIN) from None


def _tensors(members: _Members) -> tuple[dict[str, Tensor], list[str]]:
    """All tensors by name, and the names of those that are floating-point parameters."""
    found: dict[str, Tensor] = {}
    parameters = []
    for folder, config in _TENSORS.items():
        try:
            for name, entry in members.json(f"{folder}/{config}")["config"].items():
                found[_limits.check_name(name)] = tensor = _tensor(members, folder, name, entry)
                if entry["is_param"] and not isinstance(tensor.array, Foreign) and tensor.array.dtype in _FLOATS:
                    parameters.append(name)
        except (AttributeError, LookupError, TypeError) as error:
            raise Unreadable(f"its list of tensors is not as PyTorch writes it ({shown(str(error))})", _AGAIN) from None
    _limits.check_number(len(found))
    return found, parameters


def _tensor(members: _Members, folder: str, name: str, entry: Mapping[str, Any]) -> Tensor:
    """A tensor, which is a view of the numbers in a member."""
    meta, member = entry["tensor_meta"], f"{folder}/{entry['path_name']}"
    dtype = DTYPES.get(meta["dtype"])
    if entry["use_pickle"] or dtype is None:
        return Tensor(Foreign(f"tensor {shown(name)} is pickled, or no real numbers", "Export it with plain weights."))
    shape, strides = ([length["as_int"] for length in meta[key]] for key in ("sizes", "strides"))
    offset = meta["storage_offset"]["as_int"]
    if not all(type(n) is int and 0 <= n < 2**48 for n in (*shape, *strides, offset)) or len(shape) != len(strides):
        raise Unreadable(f"tensor {shown(name)} has the shape {shown(shape)} and strides {shown(strides)}", _AGAIN)
    size = math.prod(shape)
    _limits.check_shape(name, shape, dtype, size * dtype.itemsize)
    if size == 0:
        return Tensor(np.zeros(shape, dtype))
    content = members.content(member)
    numbers = np.frombuffer(content, dtype, len(content) // dtype.itemsize)
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if max(last, size - 1) >= len(numbers):
        raise Unreadable(f"tensor {shown(name)} has more numbers than its member", _AGAIN)
    view = np.lib.stride_tricks.as_strided(numbers[offset:], shape, [step * dtype.itemsize for step in strides])
    start = members.start(member)
    if start is None:
        return Tensor(view.copy())
    return Tensor(view.copy(), Place("", start + offset * dtype.itemsize, dtype, view.shape, view.strides))


def _graph(program: Any, tensors: Mapping[str, Tensor], parameters: list[str]) -> Graph:
    """The graph of a program's JSON."""
    module = program["graph_module"]
    graph, signature = module["graph"], module["signature"]
    named, images = {}, []
    for spec in signature["input_specs"]:
        ((kind, found),) = spec.items()
        if kind == "user_input":
            images.append(found["arg"]["as_tensor"]["name"])
        elif kind in ("parameter", "buffer", "tensor_constant"):
            named[found["arg"]["name"]] = found[f"{kind}_name"]
        else:
            raise Unreadable(f"it takes an input of kind {shown(kind)}", "Export it without one.")
    if len(images) != 1:
        raise Unreadable(f"it has {len(images)} inputs", "It must take images alone.")
    if len(graph["nodes"]) > graphs.MAX_NODES:
        raise Unreadable(f"it has more than {graphs.MAX_NODES:,} operations", _AGAIN)
    lengths = graph["tensor_values"][images[0]]["sizes"]
    shape = tuple(length.get("as_int") for length in lengths)
    outputs = [found["as_tensor"]["name"] for found in graph["outputs"] if "as_tensor" in found]
    used = {value: tensors[name] for value, name in named.items()}
    carrying = set(parameters)
    leaves = {
        value: graphs.leaf_name(name, name in carrying)
        for value, name in named.items()
        if getattr(used[value].array, "dtype", None) in _FLOATS
    }
    nodes = _out_of_place([_node(node) for node in graph["nodes"]])
    found = Graph(tuple(nodes), used, leaves, images[0], shape, outputs[0])
    return graphs.needed(found)


def _node(node: Mapping[str, Any]) -> Node:
    """An operation; its operator is aten's name without overload, or the whole target of any other."""
    target = node["target"]
    op = target.split(".")[3] if target.startswith(_ATEN) else target
    positional = tuple(_argument(given["arg"]) for given in node["inputs"] if given["kind"] == 1)
    named = {str(given["name"]): _argument(given["arg"]) for given in node["inputs"] if given["kind"] != 1}
    outputs = []
    for output in node["outputs"]:
        ((kind, found),) = output.items()
        names = found if kind == "as_tensors" else [found]
        outputs += [str(name.get("name", name.get("as_name"))) for name in names if isinstance(name, dict)]
    return Node(str(op), outputs[0] if outputs else str(target), positional, named, tuple(outputs))


def _argument(given: Mapping[str, Any]) -> Any:
    """An argument: references for tensors and symbolic numbers, plain values for all else."""
    ((kind, found),) = given.items()
    if kind == "as_none":
        return None
    if kind == "as_tensor":
        return Value(found["name"])
    if kind in ("as_tensors", "as_optional_tensors", "as_sym_ints"):
        return [_argument(part) if "name" not in part else Value(part["name"]) for part in found]
    if kind in ("as_sym_int", "as_sym_float", "as_sym_bool"):
        return _argument(found)
    if kind == "as_name":
        return Value(found)
    return found


def _out_of_place(nodes: list[Node]) -> list[Node]:
    """Operations that change a tensor (``relu_``) as ones that make another, to which what follows refers."""
    newest: dict[str, str] = {}
    memory: dict[str, set[str]] = {}
    stale: set[str] = set()
    kept = []
    for node in nodes:
        renamed = [_renamed(argument, newest) for argument in node.arguments]
        settings = {name: _renamed(value, newest) for name, value in node.settings.items()}
        taken = graphs.references([*renamed, *settings.values()])
        gone = next((name for name in taken if name in stale), None)
        if gone is not None:
            raise Unreadable(f"{shown(gone)} is changed in place, and a view of it used", "Export it without that.")
        changing = node.op.endswith("_") and not node.op.endswith("__")
        if taken and (changing or node.op in _VIEWS):
            shared = memory.setdefault(taken[0], {taken[0]})
            if changing:
                stale |= shared - {taken[0]}
                newest |= {old: node.outputs[0] for old in (*newest, taken[0]) if newest.get(old, old) == taken[0]}
                shared = {node.outputs[0]}
            shared.update(node.outputs)
            memory.update(dict.fromkeys(node.outputs, shared))
        op = node.op[:-1] if changing else node.op
        kept.append(node._replace(op=op, arguments=tuple(renamed), settings=settings))
    return kept


def _renamed(value: Any, newest: Mapping[str, str]) -> Any:
    if isinstance(value, Value):
        return Value(newest.get(value.name, value.name))
    return [_renamed(part, newest) for part in value] if isinstance(value, list) else value
