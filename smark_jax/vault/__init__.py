"""The owner's vault: master key, models, customers, issued copies, verdicts, evidence, in one folder.

::

    vault.create(folder, passphrase)
    with vault.opened(folder, passphrase) as desk:
        leaves = files.flatten(base)
        made = shapes.from_weights(leaves, models.choose(leaves))  # with the network, shapes.from_network
        model = models.add(desk, "mnist-cnn", leaves, made=made)
        issuing.issue(model, customers.resolve(desk, ["Ada", "Grace"]), out)
        verdict = verdicts.trace(model, [suspect])

Every change is one sqlite transaction that also writes a log entry. The log is chained, and authenticated with a key
that only the passphrase unlocks; opening a vault checks the whole log. Verifying evidence needs no vault.
"""

from typing import TYPE_CHECKING

from smark_jax import _lazy
from smark_jax.vault.folder import Vault, create, opened

if TYPE_CHECKING:
    from smark_jax.vault import bundles as bundles
    from smark_jax.vault import commitments as commitments
    from smark_jax.vault import customers as customers
    from smark_jax.vault import documents as documents
    from smark_jax.vault import drafts as drafts
    from smark_jax.vault import evidence as evidence
    from smark_jax.vault import issuing as issuing
    from smark_jax.vault import merkle as merkle
    from smark_jax.vault import models as models
    from smark_jax.vault import names as names
    from smark_jax.vault import probes as probes
    from smark_jax.vault import queries as queries
    from smark_jax.vault import reading as reading
    from smark_jax.vault import shapes as shapes
    from smark_jax.vault import shown as shown
    from smark_jax.vault import timestamps as timestamps
    from smark_jax.vault import verdicts as verdicts
    from smark_jax.vault import verification as verification
    from smark_jax.vault import versions as versions

__all__ = [
    "Vault",
    "bundles",
    "commitments",
    "create",
    "customers",
    "documents",
    "drafts",
    "evidence",
    "issuing",
    "merkle",
    "models",
    "names",
    "opened",
    "probes",
    "queries",
    "reading",
    "shapes",
    "shown",
    "timestamps",
    "verdicts",
    "verification",
    "versions",
]

__getattr__ = _lazy.modules(__name__, [name for name in __all__ if name not in globals()])
