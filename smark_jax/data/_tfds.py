"""What concerns TFDS wherever it is called: its words and warnings, kept from users and logs."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

EMBEDDED = "mnist_5k"
INSTEAD = f"use the embedded set data.load({EMBEDDED!r}, ...)"


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
def muted(progress: bool = False) -> Iterator[None]:
    """Keeps TFDS's announcements off the screen, and its progress bars too unless ``progress``."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if not progress:
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield
