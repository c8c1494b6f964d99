"""The registry of customers, shared by all models: each has a name and a serial; serials count up from 0."""

import itertools
from collections.abc import Sequence

from smark_jax import _documents, _validate
from smark_jax.vault import _text, folder, store
from smark_jax.vault.store import Customer

__all__ = ["Customer", "add", "registered", "resolve"]

_SHOWN = 10


def registered(vault: folder.Vault, first: int = 0) -> list[Customer]:
    """All customers from serial ``first`` on, in the order of their serials."""
    return store.customers(vault.connection, first)


def add(vault: folder.Vault, names: Sequence[str]) -> list[Customer]:
    """Registers customers, all or none.

    Raises:
      SmarkError: when a name is invalid, is given twice, or is already registered.
    """
    wanted = _distinct([_text.customer_name(name) for name in names])
    with store.transaction(vault.connection):
        known = store.named(vault.connection, wanted)
        taken = [name for name in wanted if name in known]
        if taken:
            got = ", ".join(repr(name) for name in taken[:_SHOWN])
            cause = "There is nothing to do for them: leave them out."
            raise _validate.fail("customers", "new names", f"registered ones: {got}", cause)
        return _insert(vault, wanted)


def resolve(vault: folder.Vault, names: Sequence[str]) -> list[Customer]:
    """The customers with these names, in this order; unknown names are registered, all or none.

    Raises:
      SmarkError: when a name is invalid or is given twice.
    """
    wanted = _distinct([_text.customer_name(name) for name in names])
    with store.transaction(vault.connection):
        known = store.named(vault.connection, wanted)
        new = [name for name in wanted if name not in known]
        if new:
            known |= {customer.name: customer for customer in _insert(vault, new)}
    return [known[name] for name in wanted]


def _distinct(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise _validate.fail("customers", "each name once", f"{twice!r} twice", "Two customers need two names.")
    return names


def _insert(vault: folder.Vault, names: list[str]) -> list[Customer]:
    created, first = _documents.now(), store.num_customers(vault.connection)
    new = list(map(Customer, itertools.count(first), names, itertools.repeat(created)))
    folder.record(vault, "customers added", {"customers": new}, first=first, number=len(new))
    return new
