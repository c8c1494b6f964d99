"""Parties of a training, for tests."""

from smark_jax import keys


def party_secrets(num_parties: int) -> list[keys.SecretKey]:
    return [keys.derive(keys.from_bytes(bytes(32)), "party", str(party)) for party in range(num_parties)]
