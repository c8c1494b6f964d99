"""Loads a data set by name into memory; every error is one sentence that says what to do."""

import difflib
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

from smark_jax import _validate
from smark_jax.data import preparing
from smark_jax.data._tfds import EMBEDDED, first_line, muted, quiet


class Dataset(NamedTuple):
    """A labelled set of images, in memory.

    Attributes:
      images: shape [N H W C], values 0 to 255.
      labels: shape [N], values 0 to ``num_classes - 1``.
      num_classes: number of classes in the data set, whether or not all of them occur in this split.
    """

    images: UInt8[np.ndarray, "N H W C"]
    labels: Int32[np.ndarray, " N"]
    num_classes: int


class _DamagedError(OSError):
    """Prepared files cannot be read back."""

    def __init__(self, name: str, folder: str | os.PathLike[str], error: Exception):
        super().__init__(
            f"the files of {name!r} in {os.fspath(folder)} cannot be read ({first_line(error)}); delete "
            "that folder, and it will be rebuilt."
        )


def load(name: str, split: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Loads an image-classification data set, preparing it first when ``data_dir`` does not hold it yet.

    The order is that of the prepared files. TFDS shuffles once, by a hash of each example's key, so the order looks
    random (a slice such as ``"train[:10%]"`` has all classes) but is the same on every machine and in every call.

    An interrupted preparation is repeated, several processes may load the same set at once, and damaged files of
    the embedded set are rebuilt. Unfinished or damaged folders are renamed to ``incomplete.*``, never deleted.

    Args:
      name: ``"mnist_5k"``, which needs no network (``pip install "smark-jax[demo]"``), or any TFDS name such as
        ``"cifar10"``, optionally with a configuration or a version (``"cifar10:3.0.2"``). A TFDS set that is not in
        ``data_dir`` is downloaded, and preparing it requires TensorFlow; reading never does.
      split: a TFDS split, such as ``"train"``, ``"train[:10%]"`` or ``"train[100:200]+test"``.
      data_dir: folder of the prepared sets. By default TFDS's own: ``TFDS_DATA_DIR``, or ``~/tensorflow_datasets``.

    Returns:
      The whole split, decoded, as NumPy arrays.

    Raises:
      SmarkError: for an unknown name or split, or a data set other than 8-bit images of one size with one label each.
      ConnectionError: when the set is not on this machine and cannot be downloaded.
      MissingExtra: when a package that the preparation needs is missing.
      OSError: when ``data_dir`` cannot be written to, or its files cannot be read.

    Examples:
      >>> from smark_jax import data
      >>> test = data.load("mnist_5k", "test")
      >>> test.images.shape, test.labels.shape, test.num_classes
      ((1000, 28, 28, 1), (1000,), 10)
    """
    if not isinstance(name, str) or not name:
        raise _validate.fail("data.load", "the name of a data set", repr(name), f"Such as {EMBEDDED!r} or 'cifar10'.")
    if not isinstance(split, str) or not split:
        raise _validate.fail("data.load", "the name of a split", repr(split), "Such as 'train' or 'train[:10%]'.")
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR")  # TFDS itself reads the variable only once, on import.
    if name == EMBEDDED:
        data_dir = pathlib.Path(data_dir or "~/tensorflow_datasets").expanduser()
    with quiet():
        try:
            return _load(name, split, data_dir)
        except _DamagedError as damage:
            if name != EMBEDDED:
                raise
            try:
                preparing.set_aside(_embedded_folder(data_dir))
            except OSError:
                raise damage from damage.__cause__
            return _load(name, split, data_dir)


def _load(name: str, split: str, data_dir: str | os.PathLike[str] | None) -> Dataset:
    builder = _builder(name, data_dir)
    _columns(name, builder)  # Before the download: checks that this is image classification.
    if not builder.is_prepared():
        preparing.prepare(name, builder)
        builder = _builder(name, data_dir)  # Reopened: this or another process has prepared it.
    return _read(name, split, builder)


def _builder(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
    """The set's TFDS builder; nothing is downloaded or written."""
    import tensorflow_datasets as tfds

    if name == EMBEDDED:
        from smark_jax.data.mnist_5k import Mnist5k

        try:
            return Mnist5k(data_dir=data_dir)
        except Exception as error:
            raise _DamagedError(name, _embedded_folder(data_dir), error) from error
    try:
        with muted():
            return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        known = [EMBEDDED, *tfds.list_builders(with_community_datasets=False)]
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        cause = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
        cause += "TFDS lists its image classification sets at https://www.tensorflow.org/datasets/catalog/overview."
        raise _validate.fail(
            "data.load",
            f"{EMBEDDED!r} (embedded) or the name of a TFDS data set, such as 'mnist', 'fashion_mnist' or 'cifar10'",
            repr(name),
            cause,
        ) from error
    except ImportError as error:
        raise preparing.missing(name, error) from error
    except (ValueError, AssertionError) as error:  # An unknown configuration or version.
        expected = f"{EMBEDDED!r}, or a set, configuration and version that TFDS can open"
        raise _validate.fail("data.load", expected, repr(name), f"TFDS says: {first_line(error)}") from error
    except Exception as error:
        where = data_dir or "TFDS's default folder"
        raise OSError(f"TFDS cannot open {name!r} in {where}: {first_line(error)}") from error


def _embedded_folder(data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
    from smark_jax.data.mnist_5k import Mnist5k

    return pathlib.Path(data_dir or "") / Mnist5k.name / str(Mnist5k.VERSION)


def _columns(name: str, builder: Any) -> tuple[str, str, int | None]:
    """The names of the image and label features, and the number of classes."""
    import tensorflow_datasets as tfds

    features: Any = builder.info.features
    features = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
    images = [k for k, f in features.items() if isinstance(f, tfds.features.Image)]
    labels = [k for k, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
    pairs = [(image, label) for image in images for label in labels]
    if builder.info.supervised_keys in pairs:
        pairs = [builder.info.supervised_keys]
    if len(pairs) != 1:
        raise _validate.fail(
            "data.load",
            f"an image classification set: {name!r} to have one image and one class label per example",
            f"features {', '.join(f'{k} ({type(f).__name__})' for k, f in features.items()) or 'of another kind'}",
            "Segmentation, detection, video, audio and text sets do not load here.",
        )
    image, label = pairs[0]
    if np.dtype(features[image].np_dtype) != np.uint8:
        raise _validate.fail(
            "data.load", f"8-bit images in {name!r}", str(features[image].np_dtype), "Depth maps and such do not load."
        )
    return image, label, features[label].num_classes


def _read(name: str, split: str, builder: Any) -> Dataset:
    image_key, label_key, num_classes = _columns(name, builder)
    _check_split(name, split, builder)
    try:
        source = builder.as_data_source(split)
    except NotImplementedError as error:
        form = builder.info.file_format.value
        raise _validate.fail(
            "data.load",
            f"{name!r} in a form that is read without TensorFlow",
            f"{form} in {builder.data_dir}, which only TensorFlow reads",
            "Pass another data_dir to have it prepared as array_record.",
            desk="Name another folder by the variable TFDS_DATA_DIR: it is prepared there as array_record.",
        ) from error
    except Exception as error:
        raise _DamagedError(name, builder.data_dir, error) from error

    images, labels = None, np.empty(len(source), np.int32)
    for i in range(len(source)):
        try:
            example = source[i]
        except Exception as error:
            raise _DamagedError(name, builder.data_dir, error) from error
        image = example[image_key]
        if images is None:
            images = np.empty((len(source), *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            raise _validate.fail(
                "data.load",
                f"images of one size in {name!r}",
                f"{images.shape[1:]} and {image.shape}",
                "Resize them beforehand: images are loaded as they are.",
            )
        images[i], labels[i] = image, example[label_key]
    if images is None:
        raise _validate.fail("data.load", "a split with images", f"{split!r} without any", "Is the slice empty?")
    if num_classes is None or labels.min() < 0 or labels.max() >= num_classes:
        raise _validate.fail(
            "data.load",
            f"labels of 0 to one less than the number of classes of {name!r} ({num_classes})",
            f"{labels.min()} to {labels.max()}",
            "Some sets come with an unlabelled split, labelled -1.",
        )
    return Dataset(images, labels, num_classes)


def _check_split(name: str, split: str, builder: Any) -> None:
    splits = builder.info.splits
    if not splits:  # Only under tfds.testing.mock_data, which takes any split.
        return
    cause = "Slices read like 'train[:10%]', 'train[100:200]' or 'train+test'."
    try:
        num_examples = splits[split].num_examples
    except (ValueError, KeyError) as error:
        cause, reason = cause if "Unknown split" in str(error) else f"{cause} TFDS says: {first_line(error)}", error
    else:
        if num_examples > 0:
            return
        cause, reason = f"{cause} Is the slice empty?", None
    known = ", ".join(f"{key!r} ({value.num_examples:,} images)" for key, value in splits.items())
    raise _validate.fail(
        "data.load", f"a split of {name!r}: {known}, or slices of them", repr(split), cause
    ) from reason
