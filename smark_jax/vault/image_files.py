"""Images in npz files, which NumPy reads without running code: the owner's own, and the probes of a model."""

import io
import zipfile
import zlib
from pathlib import Path

import numpy as np

from smark_jax import _validate

_NONE = (KeyError, ValueError, TypeError, AttributeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What NumPy raises on a file that is not an npz file, is damaged, or lacks an array."""


def read(path: Path, content: bytes | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """The images in an npz file, in the form that the network takes, and their labels if the file has them.

    Args:
      path: of the file.
      content: its bytes, where they are sealed and have been opened; by default those of the file.

    Raises:
      SmarkError: when there is no array of numbers named ``images``.
    """
    cause = "Save them with NumPy as an npz file: the images under the name 'images', class numbers under 'labels'."
    try:
        with (
            path.open("rb") if content is None else io.BytesIO(content) as file,
            np.load(file, allow_pickle=False) as archive,
        ):
            found, labels = archive["images"], archive["labels"] if "labels" in archive.files else None
    except _NONE as error:
        got = f"a damaged file, or one without them ({type(error).__name__})"
        raise _validate.fail("images", f"an npz file with 'images' in {path}", got, cause) from None
    if found.ndim < 2 or found.dtype.kind not in "uif":
        got = f"shape {found.shape}, dtype {found.dtype} in {path}"
        raise _validate.fail("images", "an array of numbers whose first axis runs over images", got, cause)
    return found, labels


def pixels(path: Path, content: bytes | None = None) -> np.ndarray:
    """The images in an npz file, uint8 of shape [N, H, W, C].

    Raises:
      SmarkError: as :func:`read`, and when they are of another type or shape.
    """
    found, _ = read(path, content)
    if found.ndim != 4 or found.dtype != np.uint8:
        got = f"shape {found.shape}, dtype {found.dtype} in {path}"
        raise _validate.fail("images", "uint8 images of shape [N, H, W, C]", got, "Save the pixels as they are.")
    return found
