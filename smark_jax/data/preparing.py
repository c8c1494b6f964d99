"""Downloads and prepares a data set with TFDS: one process at a time, with errors that say what to do."""

import contextlib
import importlib.util
import json
import os
import pathlib
import secrets
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from smark_jax import _io, _validate, errors
from smark_jax.data._tfds import EMBEDDED, INSTEAD, first_line, muted

_PROBE_SECONDS = 5
_PROBE_HOSTS = 3


def prepare(name: str, builder: Any) -> None:
    """Lets TFDS download and write the set; of several concurrent processes, one works and the others wait."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_alone(builder))
        except OSError as error:
            raise _explained(name, builder, error) from error
        if not builder.is_prepared():
            _write(name, builder)


def _alone(builder: Any) -> contextlib.AbstractContextManager[Any]:
    """Locks the data folder against other processes; the operating system frees the lock when the process ends.

    TFDS writes to a folder with a random name and renames it at the end. Two programs with the same seed draw the same
    name, and then delete each other's files.
    """
    root = os.fspath(builder.data_dir_root)
    if "://" in root:  # A bucket: nothing there can be locked.
        return contextlib.nullcontext()
    os.makedirs(root, exist_ok=True)
    return _io.locked(pathlib.Path(root, f".{builder.name}.lock"), seconds=-1)


def _write(name: str, builder: Any) -> None:
    import tensorflow_datasets as tfds

    try:
        if builder.data_path.exists():  # It lacks its info file, but TFDS would take it for finished, and then fail.
            set_aside(pathlib.Path(builder.data_dir))
        if name != EMBEDDED:
            _fail_fast(builder)
        with muted(progress=name != EMBEDDED):  # The embedded set takes two seconds.
            builder.download_and_prepare(
                file_format="array_record", download_config=tfds.download.DownloadConfig(try_download_gcs=False)
            )
    except Exception as error:
        # Without a lock (in a bucket), TFDS's final renaming fails for all processes but the first.
        if builder.is_prepared():
            return
        raise _explained(name, builder, error) from error


def set_aside(folder: pathlib.Path) -> None:
    """Renames a folder in the way that TFDS names unfinished ones, so that it is never taken for finished."""
    with contextlib.suppress(FileNotFoundError):  # Another process was faster.
        folder.rename(folder.with_name(f"incomplete.{secrets.token_hex(3).upper()}_{folder.name}"))


def _fail_fast(builder: Any) -> None:
    """Makes the builder check for the network and for TensorFlow before it downloads.

    Otherwise TFDS would retry each download ten times, for minutes, and would miss TensorFlow only after the last byte
    had arrived. The check runs where TFDS sets up its downloads, so it does not affect ``tfds.testing.mock_data``.
    """
    make_manager = builder._make_download_manager

    def checked(**kwargs: Any) -> Any:
        try:
            urls = set(builder.url_infos or ())
        except ImportError:  # TFDS reads that list with importlib_resources, a dependency that it does not declare.
            urls = {"https://storage.googleapis.com/"}
        _reach(urls - _downloaded(builder.data_dir_root / "downloads"))
        from_tfds = type(builder).__module__.startswith("tensorflow_datasets.")
        if from_tfds and importlib.util.find_spec("tensorflow") is None:
            raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")
        return make_manager(**kwargs)

    builder._make_download_manager = checked


def _downloaded(folder: Any) -> set[str]:
    """The URLs whose files are in TFDS's download folder from an earlier attempt."""
    urls = set()
    for info in folder.glob("*.INFO") if folder.exists() else ():
        with contextlib.suppress(ValueError, AttributeError):
            urls.update(json.loads(info.read_text()).get("urls", ()))
    return urls


def _reach(urls: Iterable[str]) -> None:
    """Raises a requests error unless one of the URLs' hosts answers within seconds, with any status."""
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
    """Turns an error during preparation into one that says what to do."""
    import requests
    import tensorflow_datasets as tfds

    if isinstance(error, requests.RequestException | tfds.download.DownloadError | ConnectionError | TimeoutError):
        return ConnectionError(f"{name!r} is not on this machine and could not be downloaded; {INSTEAD}.")
    if isinstance(error, ImportError):
        return missing(name, error)
    if isinstance(error, OSError):
        kind = PermissionError if isinstance(error, PermissionError) else OSError
        return kind(
            f"cannot write {name!r} to {builder.data_dir} ({first_line(error)}); set TFDS_DATA_DIR "
            "(or pass data_dir) to a folder that you can write to."
        )
    got, cause = f"an error of TFDS ({first_line(error)})", f"{INSTEAD[0].upper()}{INSTEAD[1:]}."
    desk = f"Name the embedded set, {EMBEDDED}."
    return _validate.fail("data.load", f"{name!r} to be prepared", got, cause, desk=desk)


def missing(name: str, error: ImportError) -> errors.MissingExtra:
    """The error that names the package to install; when TFDS does not name it, it is TensorFlow."""
    package = (error.name or "tensorflow").partition(".")[0]
    if name == EMBEDDED:
        needs, instead, extra = f'needs {package}: pip install "smark-jax[demo]".', "", "demo"
    else:
        needs = (
            f"is not on this machine, and to prepare it TFDS needs {package} (pip install {package.replace('_', '-')})"
        )
        instead, extra = f"; or {INSTEAD}.", "tfds"
    at_desk = f"; or name the embedded set, {EMBEDDED}." if instead else ""
    text = f"{name!r} {needs}"
    missing = errors.MissingExtra(f"data.load: {text}{instead}", extra, desk=f"the data set {text}{at_desk}")
    missing.name = package
    return missing
