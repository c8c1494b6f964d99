"""From a data set's name to its images in memory; every failure is one sentence that says what to do."""

import contextlib
import difflib
import importlib.util
import io
import json
import logging
import os
import pathlib
import secrets
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from jaxtyping import Int32, UInt8

from smark_jax import _io, _validate, errors

_EMBEDDED = "mnist_5k"
_INSTEAD = f"use the embedded set data.load({_EMBEDDED!r}, ...)"
_PROBE_SECONDS = 5
_PROBE_HOSTS = 3


class Dataset(NamedTuple):
    """A labelled set of images, in memory.

    Attributes:
      images: shape [N H W C], values 0 to 255.
      labels: shape [N], values 0 to ``num_classes - 1``.
      num_classes: classes that the data set knows, whether or not all of them occur here.
    """

    images: UInt8[np.ndarray, "N H W C"]
    labels: Int32[np.ndarray, " N"]
    num_classes: int


class _DamagedError(OSError):
    """Prepared files that cannot be read back."""

    def __init__(self, name: str, folder: str | os.PathLike[str], error: Exception):
        super().__init__(
            f"data.load: the files of {name!r} in {os.fspath(folder)} cannot be read ({_first_line(error)}); delete "
            "that folder to have it made anew."
        )


def load(name: str, split: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Loads an image-classification data set, preparing it first when ``data_dir`` does not hold it yet.

    The order is that of the prepared files. TFDS shuffles once, by a hash of each example's key: the order looks
    random (a slice such as ``"train[:10%]"`` has all classes), and is the same on every machine and at every call.

    An interrupted preparation is done again, several processes may load the same set at once, and damaged files of
    the embedded set are made anew. Unfinished or damaged folders are renamed ``incomplete.*``, never deleted.

    Args:
      name: ``"mnist_5k"``, which needs no network (``pip install "smark-jax[demo]"``), or any TFDS name such as
        ``"cifar10"``, with a configuration or a version if wanted (``"cifar10:3.0.2"``). A TFDS set that is not in
        ``data_dir`` is downloaded, and for its preparation TensorFlow must be installed; reading never needs it.
      split: a TFDS split, such as ``"train"``, ``"train[:10%]"`` or ``"train[100:200]+test"``.
      data_dir: where prepared sets lie. By default that of TFDS: ``TFDS_DATA_DIR``, or ``~/tensorflow_datasets``.

    Returns:
      The whole split, decoded, as NumPy arrays.

    Raises:
      SmarkError: for an unknown name or split, or a data set that is not 8-bit images of one size with one label.
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
        raise _validate.fail("data.load", "the name of a data set", repr(name), f"Such as {_EMBEDDED!r} or 'cifar10'.")
    if not isinstance(split, str) or not split:
        raise _validate.fail("data.load", "the name of a split", repr(split), "Such as 'train' or 'train[:10%]'.")
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR")  # TFDS itself reads it once, when imported.
    if name == _EMBEDDED:
        data_dir = pathlib.Path(data_dir or "~/tensorflow_datasets").expanduser()
    with _quiet():
        try:
            return _load(name, split, data_dir)
        except _DamagedError as damage:
            if name != _EMBEDDED:
                raise
            try:
                _set_aside(_embedded_folder(data_dir))
            except OSError:
                raise damage from damage.__cause__
            return _load(name, split, data_dir)


def _load(name: str, split: str, data_dir: str | os.PathLike[str] | None) -> Dataset:
    builder = _builder(name, data_dir)
    _columns(name, builder)  # Before the download: is this image classification at all?
    if not builder.is_prepared():
        _prepare(name, builder)
        builder = _builder(name, data_dir)  # What was prepared, by us or by another process in the meantime.
    return _read(name, split, builder)


# --- The builder, and what it holds ---


def _builder(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
    """The set's TFDS builder; nothing is downloaded or written."""
    import tensorflow_datasets as tfds

    if name == _EMBEDDED:
        from smark_jax.data.mnist_5k import Mnist5k

        try:
            return Mnist5k(data_dir=data_dir)
        except Exception as error:
            raise _DamagedError(name, _embedded_folder(data_dir), error) from error
    try:
        with _muted():
            return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        known = [_EMBEDDED, *tfds.list_builders(with_community_datasets=False)]
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        cause = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
        cause += "TFDS lists its image classification sets at https://www.tensorflow.org/datasets/catalog/overview."
        raise _validate.fail(
            "data.load",
            f"{_EMBEDDED!r} (embedded) or the name of a TFDS data set, such as 'mnist', 'fashion_mnist' or 'cifar10'",
            repr(name),
            cause,
        ) from error
    except ImportError as error:
        raise _missing(name, error) from error
    except (ValueError, AssertionError) as error:  # An unknown configuration or version.
        expected = f"{_EMBEDDED!r}, or a set, configuration and version that TFDS can open"
        raise _validate.fail("data.load", expected, repr(name), f"TFDS says: {_first_line(error)}") from error
    except Exception as error:
        where = data_dir or "TFDS's default folder"
        raise OSError(f"data.load: TFDS cannot open {name!r} in {where}: {_first_line(error)}") from error


def _embedded_folder(data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
    from smark_jax.data.mnist_5k import Mnist5k

    return pathlib.Path(data_dir or "") / Mnist5k.name / str(Mnist5k.VERSION)


def _columns(name: str, builder: Any) -> tuple[str, str, int | None]:
    """Which features are the image and the label, and the number of classes."""
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


# --- Preparing ---


def _prepare(name: str, builder: Any) -> None:
    """Has TFDS download and write the set. Of several processes at it, one works and the others wait for it."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_alone(builder))
        except OSError as error:
            raise _explained(name, builder, error) from error
        if not builder.is_prepared():
            _write(name, builder)


def _alone(builder: Any) -> contextlib.AbstractContextManager[Any]:
    """Keeps a second process of this data folder out, which the operating system ends with the process.

    TFDS writes to a folder with a random name and renames it at the end. Two programs with the same seed draw the same
    name, and then remove each other's files.
    """
    root = os.fspath(builder.data_dir_root)
    if "://" in root:  # A bucket: nothing there can be locked.
        return contextlib.nullcontext()
    os.makedirs(root, exist_ok=True)
    return _io.locked(pathlib.Path(root, f".{builder.name}.lock"), seconds=-1)


def _write(name: str, builder: Any) -> None:
    import tensorflow_datasets as tfds

    try:
        if builder.data_path.exists():  # Without its info file: TFDS would take it for finished, and then choke.
            _set_aside(pathlib.Path(builder.data_dir))
        if name != _EMBEDDED:
            _fail_fast(builder)
        with _muted(progress=name != _EMBEDDED):  # The embedded set takes two seconds.
            builder.download_and_prepare(
                file_format="array_record", download_config=tfds.download.DownloadConfig(try_download_gcs=False)
            )
    except Exception as error:
        # Where nothing can be locked, TFDS's renaming at the end fails for all but the first process.
        if builder.is_prepared():
            return
        raise _explained(name, builder, error) from error


def _set_aside(folder: pathlib.Path) -> None:
    """Renames a folder as TFDS names its unfinished ones, so that it is never taken for a finished one."""
    with contextlib.suppress(FileNotFoundError):  # Another process was faster.
        folder.rename(folder.with_name(f"incomplete.{secrets.token_hex(3).upper()}_{folder.name}"))


def _fail_fast(builder: Any) -> None:
    """Makes the builder look for the network and for TensorFlow before it downloads.

    TFDS tries each download ten times, for minutes, and needs TensorFlow only after the last byte has arrived. The
    check sits where TFDS sets up its downloads, so that it also stays out of the way of ``tfds.testing.mock_data``.
    """
    make_manager = builder._make_download_manager

    def checked(**kwargs: Any) -> Any:
        try:
            urls = set(builder.url_infos or ())
        except ImportError:  # TFDS reads that list by way of importlib_resources, which it does not declare.
            urls = {"https://storage.googleapis.com/"}
        _reach(urls - _downloaded(builder.data_dir_root / "downloads"))
        from_tfds = type(builder).__module__.startswith("tensorflow_datasets.")
        if from_tfds and importlib.util.find_spec("tensorflow") is None:
            raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")
        return make_manager(**kwargs)

    builder._make_download_manager = checked


def _downloaded(folder: Any) -> set[str]:
    """The addresses whose files an earlier attempt left in TFDS's download folder."""
    urls = set()
    for info in folder.glob("*.INFO") if folder.exists() else ():
        with contextlib.suppress(ValueError, AttributeError):
            urls.update(json.loads(info.read_text()).get("urls", ()))
    return urls


def _reach(urls: Iterable[str]) -> None:
    """Raises a requests error unless one of the addresses' hosts answers, with whatever status, within seconds."""
    import requests

    hosts = {urlsplit(url).netloc: url for url in sorted(urls) if url.startswith("http")}
    refused = None
    for url in list(hosts.values())[:_PROBE_HOSTS]:
        try:
            requests.head(url, timeout=_PROBE_SECONDS)
            return
        except requests.RequestException as error:
            refused = error
    if refused is not None:
        raise refused


def _explained(name: str, builder: Any, error: Exception) -> Exception:
    """What to raise instead of whatever came out of a preparation."""
    import requests
    import tensorflow_datasets as tfds

    if isinstance(error, requests.RequestException | tfds.download.DownloadError | ConnectionError | TimeoutError):
        return ConnectionError(f"data.load: {name!r} is not on this machine and could not be downloaded; {_INSTEAD}.")
    if isinstance(error, ImportError):
        return _missing(name, error)
    if isinstance(error, OSError):
        kind = PermissionError if isinstance(error, PermissionError) else OSError
        return kind(
            f"data.load: cannot write {name!r} to {builder.data_dir} ({_first_line(error)}); pass data_dir, or set "
            "TFDS_DATA_DIR, to a folder that you can write to."
        )
    got, cause = f"an error of TFDS ({_first_line(error)})", f"{_INSTEAD[0].upper()}{_INSTEAD[1:]}."
    desk = f"Name the embedded set, {_EMBEDDED}."
    return _validate.fail("data.load", f"{name!r} to be prepared", got, cause, desk=desk)


def _missing(name: str, error: ImportError) -> errors.MissingExtra:
    """Which package to install; TFDS says without naming it when it is TensorFlow."""
    package = (error.name or "tensorflow").partition(".")[0]
    if name == _EMBEDDED:
        needs, instead, extra = f'needs {package}: pip install "smark-jax[demo]".', "", "demo"
    else:
        needs = (
            f"is not on this machine, and to prepare it TFDS needs {package} (pip install {package.replace('_', '-')})"
        )
        instead, extra = f"; or {_INSTEAD}.", "tfds"
    at_desk = f"; or name the embedded set, {_EMBEDDED}." if instead else ""
    text = f"{name!r} {needs}"
    missing = errors.MissingExtra(f"data.load: {text}{instead}", extra, desk=f"the data set {text}{at_desk}")
    missing.name = package
    return missing


# --- Reading ---


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
                "Resize them beforehand; data.load changes no pixel.",
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
        cause, reason = cause if "Unknown split" in str(error) else f"{cause} TFDS says: {_first_line(error)}", error
    else:
        if num_examples > 0:
            return
        cause, reason = f"{cause} Is the slice empty?", None
    known = ", ".join(f"{key!r} ({value.num_examples:,} images)" for key, value in splits.items())
    raise _validate.fail(
        "data.load", f"a split of {name!r}: {known}, or slices of them", repr(split), cause
    ) from reason


# --- Words ---


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS's and urllib3's warnings out of the log: what matters comes as an exception.

    Deprecations between TFDS and protobuf are neither the caller's nor damage to the files, even where a program makes
    warnings errors.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "urllib3")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _muted(progress: bool = False) -> Iterator[None]:
    """Keeps TFDS's announcements off the screen, and its progress bars too unless ``progress``."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if not progress:
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield
