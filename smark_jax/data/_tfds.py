"""Helpers for calls to TFDS, which keep its output and warnings away from users and logs."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

EMBEDDED = "mnist_5k"
INSTEAD = f"use the embedded set, {EMBEDDED!r}"


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps warnings of TFDS and urllib3 out of the log, since real problems raise exceptions.

    Also ignores deprecation warnings between TFDS and protobuf. The caller cannot fix them, and in a program that turns
    warnings into errors they must not look like damaged files.
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
    """Keeps TFDS's messages off the screen, and also its progress bars unless ``progress`` is set."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if not progress:
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield
