"""Packages whose modules are loaded when first used, so that a command does not wait for what it never calls."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any


def modules(package: str, names: Sequence[str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package whose attributes are these modules of its own."""

    def load(name: str) -> Any:
        if name in names:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}; its modules are {', '.join(names)}")

    return load
