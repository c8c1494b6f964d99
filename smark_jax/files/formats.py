"""All formats of weights files, in the order in which they are tried.

To add a format, write a module with ``matches``, ``read`` and ``places``, and add an entry here.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from smark_jax.errors import Unreadable
from smark_jax.files import _gguf, _keras, _msgpack, _npz, _pickle, _safetensors, _sharded, _torch
from smark_jax.files._limits import Foreign
from smark_jax.files._places import Places
from smark_jax.files._sources import Source
from smark_jax.files.networks import onnx, pt2, tflite

Leaves = Mapping[str, np.ndarray | Foreign]


class Format(NamedTuple):
    """One format of weights files.

    Attributes:
      name: as in :attr:`smark_jax.files.Weights.format`.
      suffixes: of names of such files, the usual one first. A copy has its base's if that is among them.
      matches: ``matches(content)``, whether a non-empty file is of this format, judged by its content and never by its
        name. It may raise :class:`Unreadable`.
      read: ``read(source, max_bytes)``, the leaves by name, using at most ``max_bytes`` besides the source's bytes.
        For any content it returns or raises :class:`Unreadable`, and it never runs code from the file. Quantised leaves
        are read as the float32 numbers that they stand for, unless their scales are leaves of the file too.
      places: ``places(source)``, where the leaves that ``read`` gives lie in the file, under the same names: the
        :class:`smark_jax.files._places.Place` of a leaf that can be written in place, or why another cannot.
    """

    name: str
    suffixes: tuple[str, ...]
    matches: Callable[[bytes], bool]
    read: Callable[[Source, int], Leaves]
    places: Callable[[Source], Places]


def refused(start: bytes | tuple[bytes, ...], what: str, advice: str) -> Format:
    """A format that is recognised by its first bytes and refused, with advice on what to do instead."""

    def refuse(source: Source, max_bytes: int = 0) -> Any:
        raise Unreadable(f"it is {what}", advice)

    return Format(what, (), lambda content: content.startswith(start), refuse, refuse)


FORMATS = (
    Format("pt2", (".pt2",), pt2.matches, pt2.read, pt2.places),
    # Before npz: all of them are zips.
    Format("torch", (".pt", ".pth", ".bin", ".ckpt"), _torch.matches, _torch.read, _torch.places),
    # After torch, whose older files are pickles too.
    Format("pickle", (".pkl", ".pickle", ".pt", ".pth"), _pickle.matches, _torch.read, _torch.places),
    Format("keras", (".keras",), _keras.matches, _keras.read, _keras.places),
    Format("npz", (".npz",), _npz.matches, _npz.read, _npz.places),
    Format("safetensors", (".safetensors",), _safetensors.matches, _safetensors.read, _safetensors.places),
    Format("shards", (".safetensors.index.json", ".bin.index.json"), _sharded.matches, _sharded.read, _sharded.places),
    Format("tflite", (".tflite",), tflite.matches, tflite.read, tflite.places),
    Format("hdf5", (".h5", ".hdf5"), _keras.matches_hdf5, _keras.read, _keras.places),
    refused(b"\x93NUMPY", "a single .npy array", "Save all leaves together, by name, with numpy.savez or safetensors."),
    refused(b"\x1f\x8b", "compressed with gzip", "Unpack it first (gunzip)."),
    Format("gguf", (".gguf",), _gguf.matches, _gguf.read, _gguf.places),
    refused(b"version https://git-lfs", "a pointer to a file in Git LFS", "Fetch the file itself (git lfs pull)."),
    refused(b"{", "text in JSON", "Name the file of weights itself, or the folder that it lies in."),
    refused(b"<", "text", "Was a web page saved in place of the file?"),
    Format("onnx", (".onnx",), onnx.matches, onnx.read, onnx.places),
    # Last: only its first byte identifies it.
    Format("msgpack", (".msgpack",), _msgpack.matches, _msgpack.read, _msgpack.places),
)


def of(content: bytes) -> Format:
    """Detects the format of a file's content.

    Raises:
      Unreadable: when it is none of :data:`FORMATS`.
    """
    for format in FORMATS:
        if format.matches(content):
            return format
    known = ", ".join(format.name for format in FORMATS if format.suffixes)
    raise Unreadable(f"it is in none of the formats {known}", "Convert it to safetensors.")
