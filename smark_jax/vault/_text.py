"""Names of models, customers and files, each in one form."""

import re
import unicodedata

from smark_jax import _validate

LONGEST_NAME = 200
# Joiners are part of Persian and Indic spelling; other invisible characters only make two names look alike.
_JOINERS = "\u200c\u200d"
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def model_name(name: str) -> str:
    """Checks a model's name, which is also used as a file name.

    Raises:
      SmarkError: when it has characters other than Latin letters, digits, ``.``, ``_`` and ``-``, or more than 64.
    """
    if not _MODEL.fullmatch(name):
        cause = "Models' names become names of files: choose a short one such as mnist-cnn."
        raise _validate.fail("model", "a name of letters, digits, '.', '_' and '-' (up to 64)", repr(name), cause)
    return name


def customer_name(name: str) -> str:
    """A customer's name in any script, in Unicode's composed form (NFC), without spaces around it.

    Raises:
      SmarkError: when it is empty, longer than 200 characters, or has invisible characters.
    """
    name = unicodedata.normalize("NFC", name).strip()
    if not name:
        raise _validate.fail("customer", "a name", "nothing", "Is a cell or an argument empty?")
    if len(name) > LONGEST_NAME:
        got = f"{len(name)} characters, {name[:20]!r} ..."
        raise _validate.fail("customer", f"a name of up to {LONGEST_NAME} characters", got, "Is a quote left open?")
    unseen = [] if name.isprintable() else [c for c in name if unicodedata.category(c) in _UNSEEN and c not in _JOINERS]
    if unseen:
        got = f"U+{ord(unseen[0]):04X} in {name!a}"
        raise _validate.fail("customer", "a name without control characters", got, "Type the name again.")
    return name


def file_name(serial: int, name: str, suffix: str) -> str:
    """The file name of a customer's copy: the serial, the name as every file system accepts it, and a suffix."""
    safe = re.sub(r"[^\w-]+", "-", name).strip("-_")
    while len(safe.encode()) > 120:
        safe = safe[:-1]
    return f"{serial:06d}-{safe}{suffix}" if safe else f"{serial:06d}{suffix}"
