"""RFC 3161 time stamps of commitments, which show an arbiter that a commitment existed before a sale."""

import hashlib

from smark_jax import _validate
from smark_jax.vault import folder, store
from smark_jax.vault.documents import Commitment

_LARGEST = 1_000_000
# DER's tag of a SET OF, and the tags [0] and [1] that CMS gives to its own sets: [0] to certificates and signed
# attributes, [1] to revocation lists and unsigned attributes (RFC 5652, sections 5.1 and 5.3).
_SETS = (0x31, 0xA0, 0xA1)
_CONSTRUCTED, _DEEPEST = 0x20, 50


def request(commitment: Commitment) -> bytes:
    """A time-stamp request (DER) over the SHA-256 of the commitment's file, to be sent to an authority."""
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


def check(published: bytes, response: bytes) -> str:
    """The time that a response states for a commitment's file.

    Raises:
      SmarkError: when it is not a granted response, or is about something else.
    """
    with _validate.needs("timestamp", "timestamps"):
        import rfc3161_client

    cause = "Send the request that 'smark issue --timestamp-request' wrote, and pass the answer's bytes as they came."
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
        raise _validate.fail("timestamp", "a response about this commitment", "one about another text", cause)
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


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
    found, place = [], 0
    while place < len(data):
        start, tag, size = place, data[place], data[place + 1]
        place += 2
        if tag & 0x1F == 0x1F or size == 0x80 or depth > _DEEPEST:
            raise ValueError("a tag of several bytes, an indefinite length, or too many levels")
        if size > 0x80:
            count = size - 0x80
            size, place = int.from_bytes(data[place : place + count], "big"), place + count
        end = place + size
        if end > len(data):
            raise ValueError("an element that is cut short")
        head, content = data[start:place], data[place:end]
        if tag & _CONSTRUCTED:
            inner = _elements(content, depth + 1)
            content = b"".join(sorted(inner) if tag in _SETS else inner)
        found.append(head + content)
        place = end
    return found
