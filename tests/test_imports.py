"""What importing each public module loads: what is heavy, or comes with an extra, is imported where it is used."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import smark_jax

ROOT = Path(__file__).parent.parent
JAX, SCIPY, SPARSE, OPTAX, NUMPY, JAXTYPING, URLLIB = (
    "jax scipy scipy.sparse optax numpy jaxtyping urllib.request".split()
)
HEAVY = (
    "jax flax optax orbax tensorflow_datasets array_record scipy scipy.sparse matplotlib PIL galois skimage mlxtend "
    "jinja2 rfc3161_client typer rich flwr jax_privacy dp_accounting torch tensorflow numpy jaxtyping urllib.request"
).split()
# A module that may load JAX may load NumPy and jaxtyping too. Names with a dot are what commands load.
MAY_LOAD = {
    "aggregation": {NUMPY, JAXTYPING},
    "alignment": {JAX, SCIPY, SPARSE},
    "attacks": {JAX, SCIPY, SPARSE, OPTAX},
    "blackbox": {JAX},
    "carriers": {JAX},
    "cli": {"typer", "rich"},
    "codes": {JAX},
    "data": {NUMPY, JAXTYPING},
    "embedding": {JAX},
    "errors": set(),
    "extraction": {JAX},
    "federation": {"flwr", "typer", "rich", NUMPY, JAXTYPING, URLLIB},  # Flower's own command line comes with it
    "files": {NUMPY},
    "keys": set(),
    "licence": {JAX, SCIPY},
    "losses": {JAX},
    "models": {JAX, "flax", "rich"},  # Flax draws its tables with rich
    "parallel": {JAX, OPTAX},
    "privacy": {JAX, SCIPY, SPARSE, OPTAX, "jax_privacy", "dp_accounting", URLLIB},
    "report": {"jinja2", NUMPY, JAXTYPING},
    "statistics": {JAX, SCIPY},
    "tracing": {JAX, SCIPY},
    "training": {JAX, SCIPY, SPARSE, OPTAX},
    "vault": set(),
    "vault.customers": set(),
    "vault.issuing": {JAX, SCIPY},
    "vault.names": set(),
    "vault.probes": {JAX, SCIPY},
    "vault.verdicts": {JAX, SCIPY},
    "vault.verification": {JAX, SCIPY},
}
MAY_LOAD = {name: some | {NUMPY, JAXTYPING} if JAX in some else some for name, some in MAY_LOAD.items()}

# Each import in a process of its own, forked from one that has nothing but Python's own modules, or JAX as well for
# the modules that may load it.
DRIVER = """
import importlib, json, os, sys, warnings
warnings.simplefilter("ignore")
without_jax, with_jax, heavy = (argument.split() for argument in sys.argv[1:])
found = {}
for name in (*without_jax, *with_jax):
    if name in with_jax:
        import jax
    out, into = os.pipe()
    if os.fork() == 0:
        importlib.import_module(f"smark_jax.{name}")
        loaded = [package for package in heavy if package in sys.modules]
        os.write(into, json.dumps(loaded).encode())
        os._exit(0)
    os.close(into)
    with os.fdopen(out) as pipe:
        found[name] = json.loads(pipe.read() or "null")
    os.wait()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    with_jax = {name for name, packages in MAY_LOAD.items() if JAX in packages}
    names = (" ".join(group) for group in (MAY_LOAD.keys() - with_jax, with_jax, HEAVY))
    command = [sys.executable, "-c", DRIVER, *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", MAY_LOAD)
def test_a_module_loads_no_more_than_it_says(name, loaded):
    assert loaded[name] is not None  # it could be imported
    assert set(loaded[name]) <= MAY_LOAD[name]


def test_every_public_module_says_what_it_loads():
    assert {name for name in MAY_LOAD if "." not in name} - {"cli"} == set(smark_jax.__all__)
