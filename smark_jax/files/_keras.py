"""Reads Keras: a zip with ``model.weights.h5`` in it (``.keras``), or HDF5 (``.weights.h5`` and the older ``.h5``).

A leaf is named as Keras shows it: the layer's name, then the variable's (``conv2d/kernel``). The older layout has both
names; the newer one has the layer's and numbers its variables, whose names follow from the layer's class or their
shapes. The state of the optimizer is left out. HDF5 that Keras did not write is read by the paths of its datasets.

References:
  ``keras/src/saving/saving_lib.py`` and ``keras/src/legacy/saving/legacy_h5_format.py`` of Keras 3.
"""

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from smark_jax.errors import Unreadable
from smark_jax.files import _hdf5, _limits, _places, _zip
from smark_jax.files._limits import Foreign, shown
from smark_jax.files._sources import Source

_WEIGHTS, _CONFIG = "model.weights.h5", "config.json"
_ADVICE = "The file is damaged: save it again with Keras."
_CONTAINERS = ("layers", "_layer_checkpoint_dependencies")
_NORM: list[str] = ["gamma", "beta", "moving_mean", "moving_variance"]
# The variables of layers in Keras' order, by a part of the class in snake case; a layer may lack the last ones.
_VARIABLES = {
    "batch_norm": _NORM,
    "layer_norm|group_norm": _NORM[:2],
    "^normalization": ["mean", "variance", "count"],
    "^separable": ["depthwise_kernel", "pointwise_kernel", "bias"],
    "p_re_lu": ["alpha"],
    "layer_scale": ["gamma"],
    "embedding": ["embeddings"],
    "dense|conv": ["kernel", "bias"],
}
# The order of variables in a layer; the older layout sorts them by name.
_ORDER = [
    "depthwise_kernel", "pointwise_kernel", "kernel", "gamma", "bias", "beta", "moving_mean", "moving_variance"
]  # fmt: skip

Head = _hdf5.Dataset | Foreign


class Variable(NamedTuple):
    """A variable of a layer.

    Attributes:
      layer: the name of the layer, after the names of the models and layers that hold it.
      name: of the variable.
      item: its dataset.
      head: what the dataset says of its numbers.
    """

    layer: str
    name: str
    item: _hdf5.Item
    head: Head

    @property
    def leaf(self) -> str:
        """The variable's name as a leaf."""
        return _limits.check_name(f"{self.layer}/{self.name}" if self.layer else self.name)


class Opened(NamedTuple):
    """A file of Keras.

    Attributes:
      file: its HDF5.
      start: where that begins in the file; None where it is compressed.
      variables: by their names as leaves; those of one layer are in Keras' order.
      scales: by the names of int8 kernels, those of their scales.
      named: whether layers have the names that Keras shows, and not only those of their classes.
      config: the model in JSON; None if the file holds weights alone.
    """

    file: _hdf5.File
    start: int | None
    variables: dict[str, Variable]
    scales: dict[str, str]
    named: bool
    config: str | None


def matches(data: bytes) -> bool:
    """Whether the content is a zip with Keras' weights in it.

    Raises:
      Unreadable: when it is a zip that is not safe to open.
    """
    return _zip.matches(data) and _WEIGHTS in _zip.opened(data).namelist()


def matches_hdf5(data: bytes) -> bool:
    """Whether the content is HDF5."""
    return data.startswith(_hdf5.SIGNATURE)


def read(source: Source, max_bytes: int) -> dict[str, np.ndarray | Foreign]:
    """The variables by name."""
    return leaves(opened(source.data, max_bytes))


def leaves(found: Opened) -> dict[str, np.ndarray | Foreign]:
    """The numbers of all variables by name. An int8 kernel is divided by its scale, which is left out."""
    for leaf in found.scales:
        head = found.variables[leaf].head
        found.file.take(0 if isinstance(head, Foreign) else 4 * math.prod(head.shape))
    read = {leaf: found.file.array(variable.item, leaf) for leaf, variable in found.variables.items()}
    _limits.check_number(len(read))
    for leaf, scale in found.scales.items():
        kernel, factor = read[leaf], read.pop(scale)
        if not isinstance(kernel, Foreign) and not isinstance(factor, Foreign):
            with np.errstate(all="ignore"):
                read[leaf] = np.divide(kernel, factor, dtype=np.float32)
    return read


def places(source: Source) -> _places.Places:
    """Where the numbers of the variables lie: those of datasets in one piece, unless a zip compresses them."""
    found = opened(source.data, _limits.ANY_SIZE)
    there: dict[str, _places.Place | _places.Unwritable] = {}
    for leaf, variable in found.variables.items():
        head = variable.head
        if isinstance(head, Foreign) or leaf in found.scales.values():
            continue
        if leaf in found.scales:
            there[leaf] = _places.Unwritable.QUANTISED
        elif head.start is None or found.start is None:
            there[leaf] = _places.Unwritable.PACKED
        else:
            there[leaf] = _places.in_order(found.start + head.start, head.dtype, head.shape)
    return there


def opened(data: bytes, max_bytes: int) -> Opened:
    """Lists the variables in a file's content, and reads the numbers of none.

    Raises:
      Unreadable: when it is damaged, of a rare form or beyond a limit.
    """
    content, start, config = memoryview(data), 0, None
    if _zip.matches(data):
        content, start = _member(data, _WEIGHTS, max_bytes)
        config = str(_member(data, _CONFIG, max_bytes)[0], "utf-8", "replace")
    file = _hdf5.File(content, max_bytes)
    items = file.items()
    link = next((path for path, item in items.items() if item is None), None)
    if link is not None:
        raise Unreadable(f"its {shown(link)} is a link to elsewhere", _ADVICE)
    config = file.text(items[""], "model_config") if config is None else config
    names = {path[:-5]: file.text(item, "name") for path, item in items.items() if f"/{path}".endswith("/vars")}
    sets = {path: item for path, item in items.items() if item is not None and _hdf5.is_dataset(item)}
    sets = {path: (item, file.dataset(item, path)) for path, item in sets.items()}
    variables = _newer(sets, names) if names else _older(sets)
    _limits.check_names(variable.leaf for variable in variables)
    by_leaf = {variable.leaf: variable for variable in variables}
    return Opened(file, start, by_leaf, _scales(by_leaf), not names or any(names.values()), config)


def _member(data: bytes, name: str, max_bytes: int) -> tuple[memoryview, int | None]:
    """A member's content and where it begins in the file, None if it is compressed."""
    archive, span = _zip.bounded(data, max_bytes), _zip.spans(data).get(name)
    try:
        info = archive.getinfo(name)
        if span is None:
            with archive.open(info) as stream:
                return _zip.taken(stream, info.file_size, f"its member {shown(name)}").data, None
    except KeyError:
        raise Unreadable(f"it has no member {shown(name)}", _ADVICE) from None
    except _zip.DAMAGE as error:
        raise Unreadable(f"its member {shown(name)} is damaged ({shown(str(error))})", _zip.ADVICE) from None
    content = memoryview(data)[slice(*span)]
    if zlib.crc32(content) != info.CRC:
        raise Unreadable(f"its member {shown(name)} is damaged (its checksum is another)", _zip.ADVICE)
    return content, span[0]


def _newer(sets: Mapping[str, tuple[_hdf5.Item, Head]], names: Mapping[str, str | None]) -> list[Variable]:
    """The variables of the newer layout, where a group ``vars`` holds a layer's variables by number."""
    groups: dict[str, list[str]] = {}
    for path in sets:
        groups.setdefault(path.rpartition("/")[0], []).append(path)
    found = []
    for group, paths in groups.items():
        steps = group.split("/")
        if steps[0] == "optimizer":
            continue
        owners = ["/".join(steps[: end + 1]) for end, step in enumerate(steps) if step not in (*_CONTAINERS, "vars")]
        layer = "/".join(names.get(owner) or owner.rpartition("/")[2] for owner in owners)
        keys = {path.rpartition("/")[2]: path for path in paths}
        numbers = sorted((key for key in keys if key.isdecimal()), key=int)
        heads = [sets[keys[key]][1] for key in numbers]
        kind = re.sub(r"_\d+$", "", owners[-1].rpartition("/")[2]) if owners else ""
        told = dict(zip(numbers, _names(kind, heads), strict=True))
        found += [Variable(layer, told.get(key, key), *sets[keys[key]]) for key in (*numbers, *(keys.keys() - told))]
    return found


def _names(kind: str, heads: Sequence[Head]) -> list[str]:
    """The names of a layer's variables, in order; numbers where neither the class nor the shapes tell them."""
    number, axes = len(heads), [0 if isinstance(head, Foreign) else len(head.shape) for head in heads]
    names = next((names for part, names in _VARIABLES.items() if re.search(part, kind)), None)
    if names is None:  # a layer of a class of the user's model is called by its attribute
        names = {(1,) * 4: _NORM, (1, 1): _NORM[:2]}.get(tuple(axes), ["kernel", "bias"] if axes[:1] > [1] else [])
    if names is _NORM:  # of which the first two may be missing
        return [*names[max(4 - number, 0) :], *map(str, range(4, number))]
    if number > 1 and names[:1] == ["kernel"] and not isinstance(heads[0], Foreign) and heads[0].dtype == np.int8:
        return [*names[: number - 1], *map(str, range(len(names), number - 1)), "kernel_scale"]
    return [*names[:number], *map(str, range(len(names), number))]


def _older(sets: Mapping[str, tuple[_hdf5.Item, Head]]) -> list[Variable]:
    """The variables of the older layout, where a group of the layer's name holds them by name."""
    found = []
    for path, (item, head) in sets.items():
        *steps, last = path.removeprefix("model_weights/").split("/")
        if steps[:1] == ["optimizer_weights"]:
            continue
        again = (i for i, step in enumerate(steps) if i and re.fullmatch(re.escape(steps[0]) + r"(_\d+)?", step))
        del steps[1 : next(again, 0) + 1]  # up to where the layer is named again
        found.append(Variable("/".join(steps), last.partition(":")[0], item, head))
    return sorted(found, key=lambda one: _ORDER.index(one.name) if one.name in _ORDER else len(_ORDER))


def _scales(variables: Mapping[str, Variable]) -> dict[str, str]:
    """The scales of int8 kernels, one number for each of a kernel's columns."""
    found = {}
    for leaf, (_, name, _, head) in variables.items():
        scale = variables.get(f"{leaf}_scale")
        if name != "kernel" or scale is None or isinstance(head, Foreign) or isinstance(scale.head, Foreign):
            continue
        if head.dtype == np.int8 and head.shape[-1:] == scale.head.shape:
            found[leaf] = f"{leaf}_scale"
    return found
