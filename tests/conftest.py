"""Eight virtual CPU devices, no silent broadcasting, quick compilation, and keys for the tests."""

import atexit
import functools
import gc
import importlib.metadata
import os
import pathlib
import shutil
import tempfile
from collections.abc import Generator, Iterator

# Most of the tests' time is compilation, and few of them compute for long. XLA's older emitters of loops compile twice
# as fast as its emitters of fusions, and our networks run no slower; the lowest level of optimisation compiles three
# times as fast again. Set before JAX is imported, for the processes that tests start as well. What must be exact to the
# bit is also tested as XLA compiles by itself, in a process that sets the variable below (test_shipped_level). To note
# who called each operation would take a quarter of the time that lowering takes.
OLD_EMITTERS = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11)  # which newer XLA lacks
LOOPS = "--xla_cpu_use_fusion_emitters=false" if OLD_EMITTERS else ""
QUICK = f"--xla_backend_optimization_level=0 {LOOPS} --xla_cpu_parallel_codegen_split_count=1"
# For processes that compute for longer than they compile: the first level trains as fast as XLA's own, and compiles
# random numbers four times as fast.
COMPUTES = f"--xla_backend_optimization_level=1 {LOOPS} --xla_cpu_parallel_codegen_split_count=1"
if "SMARK_TESTS_AT_XLAS_OWN_LEVEL" not in os.environ:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}"
    os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"

# What one test or command has compiled, the others take. Whoever sees no such folder is the first, and removes it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="smark-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

# Processes that tests start read our compiled modules too, which Python can be told not to keep.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

from smark_jax import keys  # noqa: E402

# Files with few tests that take long: a worker that began one of them last would leave the other idle.
_FIRST = (
    "test_robustness test_cli test_desk test_blackbox test_stress test_distributed test_paper test_alignment "
    "test_train test_parallel test_tracing what_the_aggregator_sees quickstart tracing_a_coalition "
    "how_a_fingerprint_hides test_sharding test_docs test_experiments test_protocol bring_your_own_model multi_device "
    "an_onnx_model a_pytorch_model test_package test_benchmarks test_shipped_level"
).split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; the others, and the tests of each, stay in their order."""
    items.sort(key=lambda item: _FIRST.index(item.path.stem) if item.path.stem in _FIRST else len(_FIRST))


def pytest_collection_finish() -> None:
    """What was imported so far stays, so that the collector of garbage need not look through it again and again."""
    gc.collect()
    gc.freeze()


# Linux gives a process 65,530 mappings of memory, and each program that XLA compiles takes a few: a worker that kept
# the programs of the whole suite would run out of them, and crash.
_MOST_MAPPINGS = 15_000


def _mappings() -> int:
    maps = pathlib.Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


@pytest.fixture(scope="module", autouse=True)
def _few_mappings() -> Iterator[None]:
    """Forgets compiled programs between files once there are many."""
    yield
    if _mappings() > _MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Notebooks compute for longer than they compile: their kernels optimise a little, unlike the tests."""
    with pytest.MonkeyPatch.context() as patch:
        if item.path.suffix == ".ipynb":
            patch.setenv("XLA_FLAGS", COMPUTES)
        return (yield)


@pytest.fixture
def key() -> keys.SecretKey:
    return keys.from_bytes(bytes(range(32)))


@pytest.fixture
def small_cnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CNN of 105,866 weights for experiments, whose own has 421,642."""
    from smark_jax import models

    monkeypatch.setattr(models, "CNN", functools.partial(models.CNN, width=16))
