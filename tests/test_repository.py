"""What the repository and its source distribution hold: sizes, doubles, names, and rules that documents state."""

import ast
import collections
import fnmatch
import hashlib
import re
import subprocess
import tomllib
from collections.abc import Iterator
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
        return [path for path in map(ROOT.joinpath, sorted(set(filter(None, names)))) if path.is_file()]
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


def test_the_source_distribution_holds_all_that_is_tracked():
    """Whoever packages it runs the suite from there; continuous integration and pre-commit are for checkouts."""
    settings = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    named = {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"], "pyproject.toml", ".gitignore"}
    included = named | {pattern.removeprefix("/") for pattern in settings}
    found = {path.relative_to(ROOT).parts[0] for path in files()}
    assert found - included <= {".ci", ".pre-commit-config.yaml"}
    assert included <= found  # nothing is named that is not there


def test_the_layers_in_contributing_are_those_that_are_checked():
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    block = (ROOT / "CONTRIBUTING.md").read_text().partition("```\ncli\n")[2].partition("```")[0]
    assert ["cli", *block.splitlines()] == [re.sub(r" [|:] ", "  ", layer) for layer in layers]


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted((ROOT / "smark_jax").rglob("*.py")):
        yield path.relative_to(ROOT / "smark_jax").as_posix(), ast.parse(path.read_text())


def imported(tree: ast.Module) -> set[str]:
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def test_models_alone_imports_flax():
    assert {name for name, tree in modules() if "flax" in imported(tree)} == {"models.py"}


def test_parallel_alone_chooses_devices():
    choosing = {"devices", "local_devices", "make_mesh", "pmap", "shard_map", "Mesh"}
    found = collections.defaultdict(set)
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("jax."):
                found[name] |= {node.attr} & choosing
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jax"):
                found[name] |= {alias.name for alias in node.names} & choosing
    assert {"devices", "pmap", "shard_map", "Mesh"} <= found.pop("parallel.py")
    # Carriers follow the mesh that the weights lie on, and a verdict looks at the customers on all accelerators.
    assert {name: uses for name, uses in found.items() if uses} == {
        "carriers/sharded.py": {"Mesh", "shard_map"},
        "tracing/scoring.py": {"local_devices"},
    }


def test_commands_write_through_the_console_alone():
    plain = re.compile(r"_foreign\.dumps\(|f'smark \{__version__\}'|_train_config\.EXAMPLE")
    for name, tree in modules():
        if not name.startswith("cli/"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called != "print" or plain.match(ast.unparse(node.args[0])), f"{name}:{node.lineno}"
                assert called != "rich.console.Console", f"{name}:{node.lineno}"


def test_the_files_that_contributing_names_are_there():
    """A table that names a file which was moved would send a newcomer astray."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text.partition("## Twelve changes")[2].partition("## Tests")[0]
    paths = set(re.findall(r"`((?:smark_jax|experiments|tests)/[\w/.]+)`", table))
    missing = [path for path in paths if "NAME" not in path and not (ROOT / path).exists()]
    assert len(paths) > 15 and not missing
    defined = {"DECODERS": "tracing/decoders.py", "FORMATS": "files/formats.py", "_map_parties": "parallel.py"}
    for name, path in defined.items():
        assert name in table and name in (ROOT / "smark_jax" / path).read_text()


def test_modules_have_at_most_350_lines_and_functions_60_or_say_why():
    for path in files():
        if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in ("smark_jax", "experiments"):
            text = path.read_text()
            assert text.count("\n") <= 350, path
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    said = ast.get_docstring(node) or ""
                    body = node.body[bool(said) :] or node.body
                    lines = (node.end_lineno or 0) - body[0].lineno + 1
                    assert lines <= 60 or "is long because" in said, f"{path}: {node.name}, {lines} lines"
