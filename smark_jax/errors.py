"""The errors that smark_jax raises on purpose: one class to catch, and subclasses for callers that distinguish them.

A call that refuses its input raises a :class:`SmarkError`, which is a ``ValueError``. Its text says who refused, what
was expected, what it got and the likely cause, in terms of functions and arguments. ``desk`` says the same in terms of
commands and options; the command line prints it. Any other exception is a bug in smark_jax, or comes from the operating
system (``OSError``).

Examples:
  >>> from smark_jax import errors, files
  >>> try:
  ...     files.read("absent.npz")
  ... except errors.Unreadable as error:
  ...     print(error)
  cannot read 'absent.npz': it cannot be opened (No such file or directory). Check the path and its permissions.
"""

from collections.abc import Mapping
from typing import Any

from smark_jax import _foreign


class SmarkError(ValueError):
    """Something that smark_jax foresaw and refused.

    Attributes:
      desk: the same message for the command line, in terms of commands and options.
    """

    def __init__(self, message: str, *, desk: str | None = None) -> None:
        super().__init__(message)
        self.desk = message if desk is None else desk


class Unreadable(SmarkError):
    """A file that is damaged, of another kind, or beyond a limit.

    Args:
      problem: the whole text; with ``advice``, what is wrong. The two make one line, whatever the file contains.
      advice: what to do.
      desk: as for every error.
    """

    def __init__(self, problem: str, advice: str | None = None, *, desk: str | None = None) -> None:
        super().__init__(problem if advice is None else _foreign.clean(f"{problem}. {advice}"), desk=desk)


class NothingMatched(SmarkError):
    """Alignment: the suspect has the base's shapes but not its weights, so it is not a copy.

    Attributes:
      attempt: the best :class:`smark_jax.alignment.Alignment` that was found.
    """

    attempt: Any = None


class Undecided(SmarkError):
    """A suspect was read, but whether it is a copy remains open; the text says why.

    Attributes:
      attempt: the best :class:`smark_jax.alignment.Alignment` that was found, or None.
    """

    attempt: Any = None


class Ambiguous(Undecided):
    """Shapes and content do not determine how a suspect's leaves are laid out: the user has to say.

    Attributes:
      options: for each ambiguous leaf of the base, the answers that ``given`` of :func:`smark_jax.files.match_layout`
        and ``--map`` of ``smark trace`` accept.
    """

    def __init__(
        self, message: str, options: Mapping[str, tuple[str, ...]] | None = None, *, desk: str | None = None
    ) -> None:
        super().__init__(message, desk=desk)
        self.options = dict(options or {})


class NotFinite(SmarkError):
    """A network answers NaN or infinite values."""


class TooCostly(SmarkError):
    """Even the weakest fingerprint costs more accuracy than is allowed."""


class Tampered(SmarkError):
    """A vault, its log or a sealed file was changed after smark wrote it: restore it from a backup."""


class WrongPassphrase(SmarkError):
    """The passphrase does not open the vault."""


class InUse(SmarkError):
    """Another process is using it: wait, and try again."""


class MissingExtra(SmarkError, ImportError):
    """A package is missing that a plain installation does not include; the text says how to install it.

    Attributes:
      extra: the extra of smark-jax that installs it, as in ``pip install 'smark-jax[extra]'``.
    """

    def __init__(self, message: str, extra: str = "", *, desk: str | None = None) -> None:
        super().__init__(message, desk=desk)
        self.extra = extra
