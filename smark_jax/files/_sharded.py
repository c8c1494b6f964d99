"""Reads the index of a model in several files, as Hugging Face's libraries cut one: JSON that names each leaf's file.

References:
  https://huggingface.co/docs/safetensors/index for a shard; ``model.safetensors.index.json`` of any sharded model.
"""

from types import ModuleType

import numpy as np

from smark_jax.errors import Unreadable
from smark_jax.files import _limits, _safetensors, _torch
from smark_jax.files._limits import Foreign, shown
from smark_jax.files._places import Place, Unwritable
from smark_jax.files._sources import Source

_SHARDS = (_safetensors, _torch)
_MAX_INDEX = 8 * 2**20
_MAX_FILES = 4096
_ADVICE = "The index is damaged: ask for the model again, or name one of its files."


def matches(data: bytes) -> bool:
    """Whether the content is JSON with a map from leaves to files."""
    return data[:64].lstrip()[:1] == b"{" and b'"weight_map"' in data


def read(source: Source, max_bytes: int) -> dict[str, np.ndarray | Foreign]:
    """The leaves of all files that the index names."""
    found: dict[str, np.ndarray | Foreign] = {}
    for file, names in _files(source.data).items():
        shard, format = _shard(source, file)
        taken = sum(leaf.nbytes for leaf in found.values() if isinstance(leaf, np.ndarray))
        leaves = format.read(shard, max_bytes - taken)
        missing = next((name for name in names if name not in leaves), None)
        if missing is not None:
            raise Unreadable(f"leaf {shown(missing)} is not in its file {shown(file)}", _ADVICE)
        twice = next((name for name in leaves if name in found), None)
        if twice is not None:
            raise Unreadable(f"the leaf {shown(twice)} occurs in two of its files", _ADVICE)
        found |= leaves  # with leaves that the index leaves out, so that it cannot hide any
        _limits.check_number(len(found))
    return found


def places(source: Source) -> dict[str, Place | Unwritable]:
    """Where the leaves lie in their files."""
    found: dict[str, Place | Unwritable] = {}
    for file in _files(source.data):
        shard, format = _shard(source, file)
        for name, place in format.places(shard).items():
            found[name] = place._replace(file=file) if isinstance(place, Place) else place
    return found


def _files(data: bytes) -> dict[str, list[str]]:
    """The files that the index names, with the leaves that it says are in them."""
    if len(data) > _MAX_INDEX:
        raise Unreadable(f"its index has more than {_MAX_INDEX:,} bytes", _ADVICE)
    leaves = _limits.json_object(data, "its index", _ADVICE).get("weight_map")
    if not isinstance(leaves, dict) or not all(isinstance(file, str) for file in leaves.values()):
        raise Unreadable("its index does not name a file for each leaf", _ADVICE)
    files: dict[str, list[str]] = {}
    for name, file in leaves.items():
        files.setdefault(file, []).append(_limits.check_name(name))
    _limits.check_number(len(leaves))
    if len(files) > _MAX_FILES:
        raise Unreadable(f"its index names more than {_MAX_FILES:,} files", _ADVICE)
    return files


def _shard(source: Source, file: str) -> tuple[Source, ModuleType]:
    """One of the files, and the module that reads it."""
    shard = Source(source.beside(file))
    format = next((format for format in _SHARDS if format.matches(shard.data)), None)
    if format is None:
        raise Unreadable(f"its file {shown(file)} is neither safetensors nor PyTorch", _ADVICE)
    return shard, format
