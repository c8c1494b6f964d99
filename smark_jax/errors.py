"""What smark_jax raises on purpose: one class to catch, and subclasses where a caller decides by them.

Whatever a call refuses, it raises a :class:`SmarkError`, which is a ``ValueError``. Its text says who refused, what was
expected, what came and the likely cause, in terms of functions and arguments. ``desk`` says the same in terms of
commands and options: the command line prints that. Any other exception is a bug of ours, or comes from the operating
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
      desk: the same for a person at the command line, which has commands and options in place of functions.
    """

    def __init__(self, message: str, *, desk: str | None = None) -> None:
        super().__init__(message)
        self.desk = message if desk is None else desk


class Unreadable(SmarkError):
    """A file that is damaged, of another kind, or beyond a limit.

    Args:
      problem: the whole text, or, before ``advice``, what is wrong: the two make one line, whatever stands in the file.
      advice: what to do.
      desk: as for every error.
    """

    def __init__(self, problem: str, advice: str | None = None, *, desk: str | None = None) -> None:
        super().__init__(problem if advice is None else _foreign.clean(f"{problem}. {advice}"), desk=desk)


class NothingMatched(SmarkError):
    """Alignment: the suspect has the base's form, and none of its weights; it is no copy.

    Attributes:
      attempt: the best :class:`smark_jax.alignment.Alignment` that was found.
    """

    def __init__(self, message: str, attempt: Any = None, *, desk: str | None = None) -> None:
        super().__init__(message, desk=desk)
        self.attempt = attempt


class Undecided(SmarkError):
    """A suspect was read, and it cannot be said whether it is a copy; the text says why.

    Attributes:
      attempt: the best :class:`smark_jax.alignment.Alignment` that was found, or None.
    """

    def __init__(self, message: str, attempt: Any = None, *, desk: str | None = None) -> None:
        super().__init__(message, desk=desk)
        self.attempt = attempt


class Ambiguous(Undecided):
    """Shapes and content do not tell how a suspect's leaves are laid out: the person who asks has to say.

    Attributes:
      options: for each leaf of the base in question, the answers that ``given`` of :func:`smark_jax.files.match_layout`
        and ``--map`` of ``smark trace`` take.
    """

    def __init__(
        self, message: str, options: Mapping[str, tuple[str, ...]] | None = None, *, desk: str | None = None
    ) -> None:
        super().__init__(message, desk=desk)
        self.options = dict(options or {})


class TooCostly(SmarkError):
    """No strength of a fingerprint costs as little accuracy as was asked for."""


class Tampered(SmarkError):
    """A vault, its log or a sealed file is not as smark wrote it: restore it from a backup."""


class WrongPassphrase(SmarkError):
    """The passphrase does not open the vault."""


class InUse(SmarkError):
    """Another process is at work there: wait, and try again."""


class MissingExtra(SmarkError, ImportError):
    """A package that a plain installation does not have; the text says how to install it.

    Attributes:
      extra: the extra of smark-jax that brings it, as in ``pip install 'smark-jax[extra]'``.
    """

    def __init__(self, message: str, extra: str = "", *, desk: str | None = None) -> None:
        super().__init__(message, desk=desk)
        self.extra = extra
