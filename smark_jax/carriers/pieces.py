"""The keys of a carrier's pieces: a tree, so that any part of a carrier can be opened and the rest stays secret.

The tree is that of Goldreich, Goldwasser and Micali (1986): the root is derived from the carrier key, and each node has
two children, both by HKDF. Its leaves, six levels down, are the keys of 64 pieces. A leaf tells nothing about another
one: whoever has some leaves cannot tell the others from random keys without breaking HKDF-SHA256.

A carrier of fewer than 64 blocks uses the first leaves alone (:mod:`smark_jax.carriers.hadamard`).
"""

from smark_jax import keys
from smark_jax.carriers.hadamard import MOST_PIECES


def piece_keys(key: keys.SecretKey) -> dict[int, keys.SecretKey]:
    """The keys of all 64 pieces by number: :func:`smark_jax.carriers.mark` takes all of them, or some.

    Args:
      key: the carrier key.

    Examples:
      >>> import jax.numpy as jnp
      >>> from smark_jax import carriers, keys
      >>> base = {"kernel": jnp.sin(jnp.arange(9000.0)).reshape(300, 30)}
      >>> found = carriers.piece_keys(keys.from_bytes(bytes(32)))
      >>> whole = carriers.mark(found, base, num_chips=64)
      >>> part = carriers.mark({2: found[2]}, base, num_chips=64)
      >>> chips = carriers.despread(carriers.spread(jnp.ones(64), whole), part)
      >>> whole.carrier.num_pieces, float(chips.mean().round(3))
      (4, 0.25)
    """
    nodes = [keys.derive(key, "pieces")]
    while len(nodes) < MOST_PIECES:
        nodes = [keys.derive(node, side) for node in nodes for side in ("left", "right")]
    return dict(enumerate(nodes))
