"""Without a package that only an extra brings, what needs it says which extra to install; the rest works."""

import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from smark_jax import errors, files
from smark_jax.cli import _console, _demo, _demo_show, _issue, _query
from smark_jax.training import checkpoints
from smark_jax.vault import timestamps


def fresh(name):
    """Imports a module again, as a new process would."""
    importlib.import_module(name)


COMMITMENT = SimpleNamespace(published=b"a commitment")
IMAGES = np.zeros((1, 32, 32, 1), np.uint8)
NEEDS = {
    "a request for a stamp": ("rfc3161_client", "timestamps", lambda path: timestamps.request(COMMITMENT)),
    "a stamp": ("rfc3161_client", "timestamps", lambda path: timestamps.check(b"", b"")),
    "issue": (
        "rfc3161_client",
        "timestamps",
        lambda path: _issue.issue(path / "vault", "m", out=path / "copies", timestamp_request=path / "request.tsq"),
    ),
    "report": ("jinja2", "report", lambda path: fresh("smark_jax.report.page")),
    "query": ("PIL", "query", lambda path: _query._png(IMAGES[0])),
    "demo": (
        "matplotlib",
        "demo",
        lambda path: _demo_show.run(_demo.Config(path / "demo", 1, 3, 1, 0), _console.Console()),
    ),
    "a checkpoint as base": ("orbax.checkpoint", "train", files.read_checkpoint),
    "train": (
        "orbax.checkpoint",
        "train",
        lambda path: checkpoints.fit(None, None, path, every=1, environment={}),
    ),
    "privacy": ("jax_privacy", "dp", lambda path: fresh("smark_jax.privacy")),
    "federation": ("flwr", "flower", lambda path: fresh("smark_jax.federation")),
}


@pytest.mark.parametrize("name", NEEDS)
def test_a_missing_extra_is_named_with_its_install_line(name, monkeypatch, tmp_path):
    package, extra, use = NEEDS[name]
    for loaded in list(sys.modules):  # none of them may be left from another test
        if loaded == package or loaded.startswith((f"{package}.", "smark_jax.federation")):
            monkeypatch.delitem(sys.modules, loaded)
    for module in ("smark_jax.report.page", "smark_jax.privacy"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(errors.MissingExtra, match=rf"pip install 'smark-jax\[{extra}\]'") as refusal:
        use(tmp_path)
    assert refusal.value.extra == extra
    assert package.partition(".")[0] in refusal.value.desk
    assert not list(tmp_path.iterdir())
