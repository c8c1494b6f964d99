"""The documentation runs: its Python blocks, what they print, and the block that a newcomer copies first.

A page's blocks run in order in one namespace, in an empty folder. After a block, the word "prints" and a text block say
what it prints. Two HTML comments, which readers do not see, change that: ``<!-- first: CODE -->`` runs CODE, and
``<!-- not run: REASON -->`` means that the next block is only compiled.
"""

import re
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
import test_package

import smark_jax

ROOT = test_package.ROOT
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_PIECE = re.compile(
    r"^<!-- (?P<kind>first|not run):(?P<note>.*?)-->$"
    r"|^(?P<indent> *)```python\n(?P<code>.*?)^ *```$(?:\n+prints\n+```text\n(?P<shown>.*?)^```$)?",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    line: int
    code: str
    shown: str | None  # what it prints, where the page says so
    runs: bool


def blocks(text: str) -> list[Block]:
    found, skip = [], False
    for piece in _PIECE.finditer(text):
        line = text[: piece.start()].count("\n") + 1
        if piece["kind"] == "not run":
            assert piece["note"].strip(), f"line {line}: 'not run' without a reason"
            skip = True
        elif piece["kind"] == "first":
            found.append(Block(line, piece["note"].strip(), None, True))
        else:
            code = re.sub(f"^{piece['indent']}", "", piece["code"], flags=re.MULTILINE)
            found.append(Block(line, code, piece["shown"], not skip))
            skip = False
    return found


def execute(text: str, name: str, capsys) -> None:
    namespace = {"__name__": "__main__"}
    for block in blocks(text):
        code = compile("\n" * block.line + block.code, name, "exec")
        if not block.runs:
            continue
        capsys.readouterr()
        exec(code, namespace)
        if block.shown is not None:
            assert capsys.readouterr().out.strip() == block.shown.strip(), f"{name}, line {block.line}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda page: str(page.relative_to(ROOT))
)
def test_python_blocks_of_a_page_run_and_print_what_it_says(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with jax.numpy_rank_promotion("allow"):  # as readers have it
        execute(page.read_text(), str(page.relative_to(ROOT)), capsys)


def test_a_page_that_is_wrong_is_refused(capsys):
    page = "<!-- first: x = 2 -->\n```python\nprint(x + 1)\n```\n\nprints\n\n```text\n{}\n```\n"
    execute(page.format(3), "right", capsys)
    with pytest.raises(AssertionError, match="wrong, line 2"):
        execute(page.format(4), "wrong", capsys)
    skipped = "<!-- not run: no network -->\n```python\n1 / 0\n```\n"
    execute(skipped, "skipped", capsys)
    with pytest.raises(ZeroDivisionError):
        execute(skipped + "```python\n1 / 0\n```\n", "the next one runs", capsys)
    with pytest.raises(AssertionError, match="without a reason"):
        execute(skipped.replace(" no network ", ""), "no reason", capsys)


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_the_first_block_is_a_readers_own_and_prints_a_trace(page):
    """The test above runs it in an empty namespace: no hidden block comes first."""
    text = (ROOT / page).read_text()
    block = blocks(text)[0]
    assert block.runs and "42" in str(block.shown)
    assert "<!-- first:" not in text.partition("```python")[0]


def test_the_reference_has_every_public_module():
    listed = re.findall(r"^::: (\S+)$", "\n".join(page.read_text() for page in PAGES), flags=re.MULTILINE)
    assert len(set(listed)) == len(listed)
    assert {f"smark_jax.{name}" for name in smark_jax.__all__} <= set(listed)
    assert set(listed) <= set(test_package.MODULES)


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    pages = {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.parts[-2:] != (ROOT.name, "README.md")}
    assert set(re.findall(r"\S+\.md", navigation)) == pages


def test_a_page_shows_the_file_that_the_demo_runs():
    from smark_jax.cli import _demo

    shown = re.findall(r'^--8<-- "(.+)"$', (ROOT / "docs" / "demo.md").read_text(), flags=re.MULTILINE)
    assert [ROOT / path for path in shown] == [Path(_demo.__file__)]
    assert "pymdownx.snippets" in (ROOT / "mkdocs.yml").read_text()


def test_the_reference_has_every_command():
    from smark_jax import cli

    page = (ROOT / "docs/reference/command-line.md").read_text()
    groups = [("", cli.app), *((f"{group.name} ", group.typer_instance) for group in cli.app.registered_groups)]
    names = [
        prefix + (command.name or command.callback.__name__.replace("_", "-"))
        for prefix, app in groups
        for command in app.registered_commands
    ]
    assert set(re.findall(r"^\| `smark ([a-z -]+)` \|", page, flags=re.MULTILINE)) == set(names)


def test_the_page_of_tables_shows_the_results_that_are_kept():
    page = (ROOT / "docs" / "paper.md").read_text()
    kept = (ROOT / "experiments" / "paper" / "results" / "tables.md").read_text()
    lines = [line for line in kept.splitlines() if line.startswith(("|", "**", "`"))]
    assert len(lines) > 50
    assert [line for line in lines if line not in page] == []
