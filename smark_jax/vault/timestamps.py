"""RFC 3161 time stamps: they show an arbiter that a commitment existed before a sale, and draw a draft's codewords."""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

from smark_jax import _validate
from smark_jax.vault import folder, store
from smark_jax.vault.documents import Commitment, Draft

_LARGEST = 1_000_000
# DER's tag of a SET OF, and the tags [0] and [1] that CMS gives to its own sets: [0] to certificates and signed
# attributes, [1] to revocation lists and unsigned attributes (RFC 5652, sections 5.1 and 5.3).
_SETS = (0x31, 0xA0, 0xA1)
_CONSTRUCTED, _DEEPEST = 0x20, 50
_OCTETS = 0x04


def request(commitment: Commitment | Draft) -> bytes:
    """A time-stamp request (DER) over the SHA-256 of a commitment's or draft's file, to be sent to an authority."""
    with _validate.needs("timestamp", "timestamps"):
        import rfc3161_client

    builder = rfc3161_client.TimestampRequestBuilder().hash_algorithm(rfc3161_client.HashAlgorithm.SHA256)
    return builder.data(commitment.published).build().as_bytes()


def add(vault: folder.Vault, commitment: Commitment, response: bytes) -> str:
    """Stores an authority's response with the commitment it is about, and returns the time it states.

    The authority's signature is not checked here, because that needs its certificate; use ``openssl ts -verify``.

    Raises:
      SmarkError: when it is not a granted response, or is about something else.
    """
    time = check(commitment.published, response)
    rows = {"timestamps": [(commitment.model, commitment.number, time, response)]}
    folder.record(vault, "time stamp stored", rows, model=commitment.model, number=commitment.number)
    return time


def stored(vault: folder.Vault, commitment: Commitment) -> list[store.Stamp]:
    """The time stamps that are kept with a commitment."""
    return store.stamps(vault.connection, commitment.model, commitment.number)


def check(published: bytes, response: bytes, *, what: str = "commitment", command: str = "issue") -> str:
    """The time that a response states for a published file.

    Args:
      published: the file.
      response: what the authority answered.
      what: the file is, in a word.
      command: wrote the request.

    Raises:
      SmarkError: when it is not a granted response, or is about something else.
    """
    with _validate.needs("timestamp", "timestamps"):
        import rfc3161_client

    cause = (
        f"Send the request that 'smark {command} --timestamp-request' wrote, and pass the answer's bytes as they came."
    )
    expected = "a granted RFC 3161 response"
    granted = (rfc3161_client.PKIStatus.GRANTED, rfc3161_client.PKIStatus.GRANTED_WITH_MODS)
    try:
        found = rfc3161_client.decode_timestamp_response(_with_sorted_sets(response[:_LARGEST]))
        if found.status in granted:
            imprint, time = bytes(found.tst_info.message_imprint.message), found.tst_info.gen_time
        else:
            imprint = time = None
    except ValueError as error:  # rfc3161-client's
        got = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _validate.fail("timestamp", expected, f"other bytes ({got})", cause) from error
    if imprint is None or time is None:
        raise _validate.fail("timestamp", expected, f"status {found.status}", cause)
    if imprint != hashlib.sha256(published).digest():
        raise _validate.fail("timestamp", f"a response about this {what}", "one about another text", cause)
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


def signature(response: bytes) -> bytes:
    """The authority's signature in a response that :func:`check` accepts (RFC 5652, sections 5.1 and 5.3).

    It is the one part that nobody but the authority can make, and, of an RSA key, the one part that nobody can write in
    another way either. RFC 3161 (section 2.4.2) allows one signature only, and so does ``openssl ts -verify``.

    Raises:
      SmarkError: when there is not exactly one, or the response is not in DER.
    """
    try:
        (answer,) = _parts(response[:_LARGEST])
        _, token = _parts(answer.content)
        _, wrapped = _parts(token.content)
        (signed,) = _parts(wrapped.content)
        *_, signers = _parts(signed.content)
        (signer,) = _parts(signers.content)
        (found,) = (part.content for part in _parts(signer.content) if part.tag == _OCTETS)
    except (IndexError, ValueError):
        cause = "Ask the authority again, or another one."
        raise _validate.fail("timestamp", "a token in DER with one signature", "another form", cause) from None
    return found


def _with_sorted_sets(response: bytes) -> bytes:
    """The response with the elements of its sets in DER order; unchanged when it is not DER.

    RFC 5652 lets an authority write its certificates in any order, but rfc3161-client accepts only DER order. The hash
    and the time that are read here lie in an octet string, which sorting does not change. The vault stores and passes
    on the original response, so that the authority's signature can still be checked.
    """
    try:
        return b"".join(_elements(response, 0))
    except (IndexError, ValueError):
        return response


def _elements(data: bytes, depth: int) -> list[bytes]:
    """The consecutive DER elements in ``data``, with the sets inside them sorted."""
    if depth > _DEEPEST:
        raise ValueError("too many levels")
    found = []
    for part in _parts(data):
        content = part.content
        if part.tag & _CONSTRUCTED:
            inner = _elements(content, depth + 1)
            content = b"".join(sorted(inner) if part.tag in _SETS else inner)
        found.append(part.head + content)
    return found


class _Part(NamedTuple):
    """A DER element: its tag, tag and length as they are written, and its content."""

    tag: int
    head: bytes
    content: bytes


def _parts(data: bytes) -> Iterator[_Part]:
    """The consecutive DER elements in ``data``."""
    place = 0
    while place < len(data):
        start, tag, size = place, data[place], data[place + 1]
        place += 2
        if tag & 0x1F == 0x1F or size == 0x80:
            raise ValueError("a tag of several bytes, or an indefinite length")
        if size > 0x80:
            count = size - 0x80
            size, place = int.from_bytes(data[place : place + count], "big"), place + count
        end = place + size
        if end > len(data):
            raise ValueError("an element that is cut short")
        yield _Part(tag, data[start:place], data[place:end])
        place = end
