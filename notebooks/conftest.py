"""Notebooks compute for longer than they compile: as tests, they run at XLA's own level of optimisation."""

import os
from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Hides the flags that the tests set for themselves (tests/conftest.py) from a notebook's kernel."""
    flags = os.environ.pop("XLA_FLAGS", None)
    try:
        return (yield)
    finally:
        if flags is not None:
            os.environ["XLA_FLAGS"] = flags
