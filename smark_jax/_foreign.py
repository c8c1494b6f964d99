"""Untrusted text: names, paths, fields of files, answers of services, messages of exceptions.

A terminal obeys control characters, and a reader trusts the beginning of a line: text that moves the cursor, reverses
the writing direction or breaks the line can make a failed check look like a passed one. So untrusted text is cleaned
before it reaches a terminal, a log or a page (:mod:`smark_jax.cli`, :mod:`smark_jax.report`), and before it enters a
message (``_validate.fail``).
"""

import json
import re
import unicodedata
from typing import Any

LONGEST = 4_000
"""Texts of up to this many characters are shown whole."""

# Control characters (C0, DEL, C1), format characters (directions, zero-width ones, tags), surrogates, private use, line
# and paragraph separators; and letters, marks and symbols that are invisible when drawn.
_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160\u17b4\u17b5\u180e"
    "\u200b-\u200f\u2028-\u202e\u2060-\u206f\u2800\u3164\ud800-\uf8ff\ufeff\uffa0\ufff9-\ufffb\U000110bd\U000110cd"
    "\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff\U000f0000-\U0010ffff]"
)
_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_JOINERS = "\u200c\u200d"
_MARK = "[\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]"
# More combining marks on one letter than any language uses: they would be drawn over the lines above and below.
_PILE = re.compile(f"(?P<some>{_MARK}{{4}})(?P<rest>{_MARK}+)")


def clean(text: object, longest: int = LONGEST) -> str:
    r"""Untrusted text as one fully visible line: characters that a terminal would obey or hide are escaped.

    Joiners stay in emoji and in the scripts that need them. The middle of an overlong text is cut out.

    Args:
      text: any object; it is converted by ``str``.
      longest: the most characters to return.

    Examples:
      >>> from smark_jax import _foreign
      >>> print(_foreign.clean("leak\x1b[2K\nholds"))
      leak\x1b[2K\nholds
      >>> _foreign.clean("a" * 30, longest=7)
      'aaa…aaa'
    """
    line = text if isinstance(text, str) else str(text)
    if len(line) > longest:
        head = longest // 2
        line = f"{line[:head]}…{line[len(line) - (longest - head - 1) :]}"
    if line.isascii() and line.isprintable():
        return line
    line = _UNSEEN.sub(lambda found: found[0] if _joins(found) else spelt(found[0]), line)
    return _PILE.sub(lambda found: found["some"] + "".join(map(spelt, found["rest"])), line)


def spelt(char: str) -> str:
    r"""The escape of a character, as Python writes it: ``\x1b``, ``\u202e``; ``\n`` for a line break."""
    number = ord(char)
    return _NAMED.get(char) or (
        f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
    )


def blanked(text: str) -> str:
    """Text of the same length: each character that :func:`clean` would escape is replaced, except line breaks."""
    return _UNSEEN.sub(lambda found: found[0] if found[0] == "\n" or _joins(found) else "\ufffd", text)


def dumps(document: Any, *, indent: int | None = None) -> str:
    r"""JSON in readable Unicode with invisible characters escaped (``\u202e``), safe to print and to parse."""
    text = json.dumps(document, ensure_ascii=False, indent=indent)
    if text.isascii() and "\x7f" not in text:
        return text
    return _UNSEEN.sub(lambda found: found[0] if found[0] == "\n" else _escaped(found[0]), text)


def _escaped(char: str) -> str:
    units = char.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[start : start + 4]}" for start in range(0, len(units), 4))


def _joins(found: re.Match[str]) -> bool:
    """Whether a match is a joiner in an emoji or after a letter of a script that uses joiners (Arabic to Mongolian)."""
    before = found.string[found.start() - 1 : found.start()]
    if found[0] not in _JOINERS or not before:
        return False
    return "\u0600" <= before <= "\u18af" or before == "\ufe0f" or unicodedata.category(before) in ("So", "Sk")
