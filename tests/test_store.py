"""All SQL stands in vault/store: another database is a change of one folder."""

import ast
import re
from pathlib import Path

import pytest

import smark_jax

_PACKAGE = Path(smark_jax.__file__).parent
_STORE = _PACKAGE / "vault" / "store"
_STATEMENT = re.compile(
    r"\s*((SELECT|INSERT|UPDATE|DELETE|CREATE|DROP|ALTER|PRAGMA)\s|(VACUUM|BEGIN|COMMIT|ROLLBACK)\b)"
)


def sql(source: str) -> list[str]:
    """Statements in a module's strings, calls that run one, and imports of sqlite3."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and _STATEMENT.match(node.value):
            found.append(node.value)
        elif isinstance(node, ast.Attribute) and node.attr in ("execute", "executemany", "executescript", "fetchone"):
            found.append(node.attr)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [name for name in names if name.partition(".")[0] == "sqlite3"]
    return found


def test_no_module_outside_the_store_holds_sql():
    elsewhere = [path for path in _PACKAGE.rglob("*.py") if _STORE not in path.parents]
    assert len(elsewhere) > 100
    assert {str(path): found for path in elsewhere if (found := sql(path.read_text(encoding="utf-8")))} == {}


def test_the_search_for_sql_finds_what_the_store_holds():
    found = [one for path in _STORE.glob("*.py") for one in sql(path.read_text(encoding="utf-8"))]
    assert "sqlite3" in found and found.count("execute") > 20
    assert sum(bool(_STATEMENT.match(one)) for one in found) > 20


@pytest.mark.parametrize(
    "line", ['rows("SELECT 1")', 'f"PRAGMA x = {n}"', "connection.execute(query)", "import sqlite3"]
)
def test_the_search_for_sql_knows_each_way_to_hold_it(line):
    assert sql(line)
