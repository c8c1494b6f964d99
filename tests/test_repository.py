"""What the repository and its source distribution hold: sizes, doubles, names, and rules that documents state."""

import collections
import fnmatch
import hashlib
import re
import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PICTURES = {".png", ".ipynb"}
MOST_BYTES = 300_000


def files() -> list[Path]:
    """What belongs to the project: in a checkout what git tracks or would, elsewhere all that it does not ignore."""
    if (ROOT / ".git").exists():
        command = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        return [path for path in map(ROOT.joinpath, filter(None, names)) if path.is_file()]
    return [path for path in ROOT.rglob("*") if path.is_file() and not _ignored(path.relative_to(ROOT))]


def _ignored(path: Path) -> bool:
    for pattern in (ROOT / ".gitignore").read_text().split():
        anchored = "/" in pattern.rstrip("/")
        candidates = [str(path)] if anchored else path.parts
        if any(fnmatch.fnmatch(name, pattern.rstrip("/")) for name in candidates):
            return True
    return path.name == "PKG-INFO"


def test_the_files_are_found():
    names = {path.relative_to(ROOT).as_posix() for path in files()}
    assert {"pyproject.toml", "smark_jax/__init__.py", "tests/test_repository.py", "tests/data/vault-1.zip"} <= names
    assert len(names) > 300


def test_only_notebooks_and_pictures_are_large():
    large = [path for path in files() if path.suffix not in PICTURES and path.stat().st_size > MOST_BYTES]
    assert not large


def test_no_file_stands_twice():
    found = collections.defaultdict(list)
    for path in files():
        if path.stat().st_size:
            found[hashlib.sha256(path.read_bytes()).digest()].append(path.relative_to(ROOT).as_posix())
    assert not [names for names in found.values() if len(names) > 1]


def test_nothing_names_a_machine_or_a_registry():
    texts = {".py", ".md", ".ipynb", ".toml", ".yaml", ".yml", ".cfg", ".cff", ".json"}
    for path in files():
        if path.suffix in texts and path != Path(__file__):
            assert not re.search(r"files\.pythonhosted|pypi\.org/simple|/ho[m]e/|/ro[o]t/", path.read_text()), path
