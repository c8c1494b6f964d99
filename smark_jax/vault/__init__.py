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

from smark_jax.vault import (
    bundles,
    commitments,
    customers,
    documents,
    evidence,
    issuing,
    merkle,
    models,
    names,
    probes,
    queries,
    reading,
    shapes,
    shown,
    timestamps,
    verdicts,
    verification,
    versions,
)
from smark_jax.vault.folder import Vault, create, opened

__all__ = [
    "Vault",
    "bundles",
    "commitments",
    "create",
    "customers",
    "documents",
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
