"""RFC 3161 time stamps of commitments: what shows an arbiter that a commitment existed before a sale."""

import hashlib

from smark_jax import _validate
from smark_jax.vault import commitments, folder

_LARGEST = 1_000_000


def request(commitment: commitments.Commitment) -> bytes:
    """A time-stamp request (DER) over the SHA-256 of the commitment's file, to be sent to an authority."""
    import rfc3161_client

    builder = rfc3161_client.TimestampRequestBuilder().hash_algorithm(rfc3161_client.HashAlgorithm.SHA256)
    return builder.data(commitment.published).build().as_bytes()


def store(vault: folder.Vault, commitment: commitments.Commitment, response: bytes) -> str:
    """Keeps an authority's response with the commitment it is about, and returns the time it states.

    The authority's signature is not checked here, since that takes its certificate: ``openssl ts -verify`` does it.

    Raises:
      ValueError: when it is no granted response, or one about something else.
    """
    time = check(commitment.published, response)
    rows = {"timestamps": [(commitment.model, commitment.number, time, response)]}
    folder.record(vault, "time stamp stored", rows, model=commitment.model, number=commitment.number)
    return time


def stored(vault: folder.Vault, commitment: commitments.Commitment) -> list[tuple[str, bytes]]:
    """The times and responses that are kept with a commitment."""
    return vault.connection.execute(
        "SELECT time, response FROM timestamps WHERE model = ? AND number = ?", (commitment.model, commitment.number)
    ).fetchall()


def check(published: bytes, response: bytes) -> str:
    """The time that a response states for a commitment's file.

    Raises:
      ValueError: when it is no granted response, or one about something else.
    """
    import rfc3161_client

    cause = "Send the request that 'smark issue --timestamp-request' wrote, and pass the answer's bytes as they came."
    expected = "a granted RFC 3161 response"
    try:
        found = rfc3161_client.decode_timestamp_response(response[:_LARGEST])
        if found.status not in (rfc3161_client.PKIStatus.GRANTED, rfc3161_client.PKIStatus.GRANTED_WITH_MODS):
            raise _validate.fail("timestamp", expected, f"status {found.status}", cause)
        imprint, time = bytes(found.tst_info.message_imprint.message), found.tst_info.gen_time
    except ValueError as error:
        got = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _validate.fail("timestamp", expected, got, cause) from None
    if imprint != hashlib.sha256(published).digest():
        raise _validate.fail("timestamp", "a response about this commitment", "one about another text", cause)
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")
