"""All formats of weights files, in the order in which they are tried.

To add a format, write a module with ``matches``, ``read`` and, if it can be written, ``write``, and add an entry here.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from smark_jax.errors import Unreadable
from smark_jax.files import _msgpack, _npz, _pickle, _safetensors, _torch
from smark_jax.files._limits import Foreign
from smark_jax.files.networks import onnx, pt2

Leaves = Mapping[str, np.ndarray | Foreign]
Writer = Callable[[BinaryIO, Mapping[str, np.ndarray], Path | None], str]


class Format(NamedTuple):
    """One format of weights files.

    Attributes:
      name: as in :attr:`smark_jax.files.Weights.format`.
      matches: ``matches(content)``, whether a non-empty file is of this format, judged by its content and never by its
        name. It may raise :class:`Unreadable`.
      read: ``read(content, max_bytes)``, the leaves by name, using at most ``max_bytes`` besides the content. For any
        content it returns or raises :class:`Unreadable`, and it never runs code from the file.
      write: ``write(file, leaves, like)``, which writes the file and returns its SHA-256 in hex; None for a format that
        is only read.
    """

    name: str
    matches: Callable[[bytes], bool]
    read: Callable[[bytes, int], Leaves]
    write: Writer | None = None


def refused(start: bytes | tuple[bytes, ...], what: str, advice: str) -> Format:
    """A format that is recognised by its first bytes and refused, with advice on what to do instead."""

    def read(content: bytes, max_bytes: int) -> Leaves:
        raise Unreadable(f"it is {what}", advice)

    return Format(what, lambda content: content.startswith(start), read)


FORMATS = (
    Format("pt2", pt2.matches, pt2.read),
    Format("torch", _torch.matches, _torch.read),  # before npz: all three are zips
    Format("pickle", _pickle.matches, _torch.read),  # after torch, whose legacy files are pickles too
    Format("npz", _npz.matches, _npz.read),
    Format("safetensors", _safetensors.matches, _safetensors.read, _safetensors.write),
    refused(b"\x89HDF", "an HDF5 file", "Load it in Keras and save the weights with safetensors.numpy.save_file."),
    refused(b"\x93NUMPY", "a single .npy array", "Save all leaves together, by name, with numpy.savez or safetensors."),
    refused(b"\x1f\x8b", "compressed with gzip", "Unpack it first (gunzip)."),
    refused(b"GGUF", "a GGUF file", "Convert it to safetensors."),
    refused(b"version https://git-lfs", "a pointer to a file in Git LFS", "Fetch the file itself (git lfs pull)."),
    refused(b"<", "text", "Was a web page saved in place of the file?"),
    Format("onnx", onnx.matches, onnx.read),
    Format("msgpack", _msgpack.matches, _msgpack.read),  # last: only its first byte identifies it
)


def of(content: bytes) -> Format:
    """Detects the format of a file's content.

    Raises:
      Unreadable: when it is none of :data:`FORMATS`.
    """
    for format in FORMATS:
        if format.matches(content):
            return format
    raise Unreadable("it is neither safetensors, Flax msgpack, npz, ONNX, PyTorch nor a pickle", "Convert it to safetensors.")


def writer(name: str) -> Writer:
    """The function that writes files of a format."""
    (found,) = (format.write for format in FORMATS if format.name == name and format.write)
    return found
