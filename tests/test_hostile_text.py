"""Strangers whose text would redraw the answer: on a terminal, in a report, in JSON, in an error.

Each attacker writes into something that a command reads: a field of a bundle, the name of a file, the reason phrase of
a service, the message of an exception. What the command wrote is then looked at on a small terminal.
"""

import ast
import copy
import http.server
import json
import logging
import random
import sys
import threading
import unicodedata
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import terminal

import smark_jax
from smark_jax import _foreign, _validate, cli, errors, report, vault
from smark_jax.cli import _common
from smark_jax.vault import bundles, documents, verdicts

# Goes up over the line with the failed check, erases it, and writes a passed one in its place; then by markup, by a
# line's end, by turning the direction, and by what stands in no encoding.
FORGED = "holds  signature: by the owner's key"
PAYLOAD = (
    f"\x1b[1A\x1b[2K\r{FORGED}\x1b[30;40m\x9b1A\x1b]0;title\x07\n{FORGED}\r{FORGED}\x85\u2028[bold]x[/bold][/]"
    "\u202egpj\u200b\ud800\U000e0041"
)


class Case(NamedTuple):
    """A folder with a vault, a suspect, and the genuine bundle on it."""

    folder: Path
    bundle: dict[str, Any]
    verdict: dict[str, Any]


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    folder = tmp_path_factory.mktemp("hostile")
    rng = np.random.default_rng(0)
    np.savez(folder / "base.npz", kernel=rng.normal(size=(60, 100)).astype(np.float32))
    for command in (
        ("init", "vault"),
        ("add-model", "vault", "net", "base.npz", "--chips", 64),
        ("issue", "vault", "net", "Ada", "[bold]Grace[/bold]", "--out", "copies"),
        ("trace", "vault", "net", "copies/000000-Ada.npz"),
        ("evidence", "export", "vault", 1, "--out", "evidence.json"),
    ):
        done = terminal.run(*command, folder=folder)
        assert done.code == 0, done.err
    with vault.opened(folder / "vault", terminal.SECRET) as desk:
        verdict = documents.plain(verdicts.get(desk, 1, everybody=True))
    return Case(folder, json.loads((folder / "evidence.json").read_text()), verdict)


def leaves(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every field that is neither an object nor a list, and of every list and object that is empty."""
    if isinstance(value, dict | list) and value:
        for step, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, (*path, step))
    else:
        yield path


def put(document: Any, path: tuple, value: Any) -> Any:
    """A copy of a document with another value in one place."""
    changed = copy.deepcopy(document)
    place = changed
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return changed


def assert_seen(ran: terminal.Ran, width: int = 80) -> list[str]:
    """Nothing strange was written, and no line of either stream is the forged one."""
    for written in (ran.out, ran.err):
        assert terminal.strange(written) == []
        assert [line for line in terminal.screen(written, width) if line.startswith(FORGED[:16])] == []
    return terminal.screen(ran.out, width)


# --- A lying owner's bundle ---


def test_no_field_of_a_bundle_redraws_a_failed_check_as_a_passed_one(case):
    """Every field in turn, whatever a bundle will consist of: where it is read at all, the failure is still seen."""
    read = refused = 0
    for path in leaves(case.bundle):
        if path == ("signature",):
            continue
        (case.folder / "forged.json").write_text(json.dumps(put(case.bundle, path, PAYLOAD)))
        command = ("evidence", "verify", "forged.json", "copies/000000-Ada.npz", "base.npz")
        ran = terminal.run(*command, folder=case.folder, terminal=read % 2 == 0)
        assert ran.code == 1, path
        lines = assert_seen(ran)
        if ran.out:
            read += 1
            assert any(line.startswith("FAILS  signature") for line in lines), (path, lines)
            assert any("The evidence does not hold" in line for line in lines), path
        else:
            refused += 1
            assert terminal.screen(ran.err)[0].startswith("smark: expected"), path
    assert read > 8  # otherwise the attack was on nothing
    assert refused > 20


def test_a_field_that_fills_the_line_does_not_begin_the_next_one(case):
    """Without any control character: the terminal itself breaks the line where the forged check begins."""
    command = ("evidence", "verify", "forged.json", "copies/000000-Ada.npz", "base.npz")
    for filler in (30, 47, 48, 49, 50, 51, 52, 80):
        forged = put(case.bundle, ("bundle", "commitment", "header", "model"), "x" * filler + FORGED)
        (case.folder / "forged.json").write_text(json.dumps(forged))
        assert_seen(terminal.run(*command, folder=case.folder, terminal=True))


@pytest.mark.parametrize("width", [40, 60, 80])
@pytest.mark.parametrize("write", [_common.out.item, lambda sign, text: _common.out.lines(text, sign)])
def test_no_width_of_blanks_or_letters_brings_a_forged_line_to_the_left_edge(write, width):
    for filler in range(width + 1):
        for char in " x":
            written = terminal.shown(lambda: write(("FAILS", "red"), f"a: {char * filler} {FORGED}"), width)  # noqa: B023
            assert terminal.strange(written) == []
            assert not [line for line in terminal.screen(written, width) if line.startswith("holds")], filler
    # The control: what is printed without care does.
    assert any("holds" == line[:5] for line in terminal.screen(f"FAILS  {'x' * (width - 7)}{FORGED}", width))


# --- A suspect whose file is called what it likes ---


@pytest.mark.parametrize("tty", [False, True])
def test_the_name_of_a_suspect_is_only_a_name(case, tty):
    name = f"\x1b[2K\r{FORGED}\n{FORGED} [bold]x[/bold] \u202egpj\x9b1A"
    (case.folder / name).parent.mkdir(exist_ok=True)
    (case.folder / name).write_bytes((case.folder / "copies/000000-Ada.npz").read_bytes())
    ran = terminal.run("trace", "vault", "net", name, "absent\x1b[1A\x1b[2K", folder=case.folder, terminal=tty)
    assert ran.code == 1
    lines = assert_seen(ran)
    assert "a copy of Ada" in " ".join(line.strip() for line in lines)
    assert "[bold]x[/bold]" in "".join(line.strip() for line in lines)
    found = terminal.run("trace", "vault", "net", name, "--json", folder=case.folder, terminal=tty)
    assert terminal.strange(found.out) == []
    assert found.out.count("\n") == 1
    assert json.loads(found.out)["suspects"][0]["file"] == name


def test_a_name_of_bytes_that_are_no_text_does_not_end_the_program(case):
    """Linux lets a file be called anything; a lone surrogate stands for such a byte, which no terminal takes."""
    name = "leak\udcff.bin"
    (case.folder / name).write_bytes(b"nonsense")
    ran = terminal.run("trace", "vault", "net", name, folder=case.folder)
    assert "leak\\udcff.bin" in ran.out
    assert "not foreseen" not in ran.err


def test_customers_names_are_no_markup(case):
    ran = terminal.run("customers", "vault", folder=case.folder)
    assert "[bold]Grace[/bold]" in ran.out


# --- Errors ---


def raised(error: BaseException) -> Any:
    def app(**options: Any) -> None:
        raise error

    return app


@pytest.mark.parametrize(
    "error",
    [
        ValueError(PAYLOAD),
        OSError(5, PAYLOAD, PAYLOAD),
        ImportError(PAYLOAD),
        RuntimeError(PAYLOAD),
        _validate.fail("evidence", PAYLOAD, PAYLOAD, PAYLOAD),
        errors.Unreadable(PAYLOAD, PAYLOAD),
        bundles.unreadable(PAYLOAD, PAYLOAD),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("tty", [False, True])
def test_the_message_of_an_exception_is_only_a_message(monkeypatch, error, tty):
    monkeypatch.setattr(cli, "app", raised(error))
    ran = terminal.run(terminal=tty)
    assert ran.code == 1
    assert_seen(ran)
    assert ran.err.startswith("smark: ") or tty
    lines = terminal.screen(ran.err) if tty else ran.err.splitlines()
    assert all(line.startswith(("smark: ", "  ")) for line in lines if line)


def test_messages_have_two_lines_whatever_stands_in_them():
    assert str(_validate.fail("a", PAYLOAD, PAYLOAD, PAYLOAD)).count("\n") == 1
    assert "\n" not in str(errors.Unreadable(PAYLOAD, PAYLOAD)) + str(bundles.unreadable(PAYLOAD, PAYLOAD))


def test_the_reason_phrase_of_a_service_is_only_a_phrase(monkeypatch):
    """A service that answers ``503`` and then moves the cursor."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.wfile.write(f"HTTP/1.0 503 \x1b[1A\x1b[2K\r{FORGED}\x9b2K\r\n\r\n".encode("latin-1"))

        def log_message(self, *args):
            pass

    def asks(**options: Any) -> None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}")
        except urllib.error.HTTPError as error:
            error.close()
            raise

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        monkeypatch.setattr(cli, "app", asks)
        ran = terminal.run(terminal=True)
    finally:
        server.shutdown()
        server.server_close()
    assert "503" in ran.err
    assert_seen(ran)


def test_the_reason_that_a_client_gives_the_server_is_one_plain_line(caplog):
    """Flower's clients send text with their errors, which the server's log shows."""
    strategy = pytest.importorskip("smark_jax.federation.strategy")
    monitored = logging.getLogger("flwr")
    monitored.addHandler(caplog.handler)
    try:
        strategy.log(logging.WARNING, "Client %s dropped out: %s", 7, PAYLOAD)
    finally:
        monitored.removeHandler(caplog.handler)
    (line,) = {record.getMessage() for record in caplog.records}
    assert line.startswith("Client 7 dropped out: \\x1b[1A")
    assert terminal.strange(line) == []


@pytest.mark.parametrize("arguments", [(PAYLOAD.replace("\ud800", ""),), ("attack", "a", "b", "--\x1b[2K")])
def test_wrong_usage_repeats_arguments_as_text(arguments):
    """As when a shell puts the names of a folder's files into a command."""
    ran = terminal.run(*arguments)
    assert ran.code == 2
    assert_seen(ran)


# --- The report ---


def test_no_field_of_a_verdict_reaches_the_report_as_more_than_text(case):
    """Every text in turn, and every number too, where a page can be made of it at all."""
    rendered = 0
    for path in leaves(case.verdict):
        try:
            page = report.render(put(case.verdict, path, f"{PAYLOAD}<script>alert(1)</script>"))
        except (ValueError, TypeError):  # a number that is none, or a verdict of another name
            continue
        rendered += 1
        assert [char for char in page if char != "\n" and _foreign.clean(char) != char] == [], path
        assert "<script" not in page, path
    assert rendered > 12


# --- The cleaning itself ---


def test_every_unseen_character_of_unicode_is_spelt_out():
    """Against Python's own tables: control, format, surrogate, private and separators; in JSON as an escape."""
    unseen = [
        chr(n) for n in range(sys.maxunicode + 1) if unicodedata.category(chr(n)) in ("Cc Cf Cs Co Zl Zp".split())
    ]
    assert len(unseen) > 130_000
    some = [char for char in unseen if unicodedata.category(char) != "Co"] + random.Random(0).sample(unseen, 2_000)
    for char in some:
        assert _foreign.clean(f"a{char}b").isascii(), hex(ord(char))
        assert _foreign.blanked(char) in ("\ufffd", "\n")
        text = _foreign.dumps([char])
        assert json.loads(text) == [char]
        assert text.isascii()


@pytest.mark.parametrize(
    "name",
    [
        "Grace Hopper",
        "王小明",
        "Łukasz Żółć",
        "نمی\u200cخواهم",
        "क्\u200dष",
        "👩\u200d💻",
        "Ngô Bảo Châu",
        "J\u0301\u0323",
    ],
)
def test_names_of_all_scripts_stay_as_they_are(name):
    assert _foreign.clean(name) == name
    assert _foreign.dumps(name) == json.dumps(name, ensure_ascii=False).replace("\u200c", "\\u200c").replace(
        "\u200d", "\\u200d"
    )


def test_what_only_makes_two_names_look_alike_is_shown():
    for other in ("pay\u200dpal", "pay\u00adpal", "pay\u3164pal", "pay\u034fpal", "pay\u2800pal", "И\u200cван"):
        assert "\\" in _foreign.clean(other)
    assert _foreign.clean("z" + "\u0301" * 40).count("\u0301") == 4


def test_a_text_that_is_too_long_is_cut_in_its_middle():
    shown = _foreign.clean("begin" + "x" * 10**6 + "end", 100)
    assert len(shown) == 100
    assert shown.startswith("begin")
    assert shown.endswith("end")
    assert "…" in shown


# --- No other door ---


def test_commands_write_through_the_one_console_only():
    """``print`` takes JSON that was cleaned, or our own text; nobody else makes a console, or has markup read."""
    allowed = {"_foreign.dumps", "_train_config.EXAMPLE", "f'smark {__version__}'"}
    for path in sorted((Path(smark_jax.__file__).parent / "cli").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in ("print", "sys.stdout.write", "sys.stderr.write", "typer.echo", "click.echo"):
                    what = [ast.unparse(a.func) if isinstance(a, ast.Call) else ast.unparse(a) for a in node.args]
                    assert set(what) <= allowed, f"{path.name}: {ast.unparse(node)}"
                assert path.name == "_console.py" or called not in ("rich.console.Console", "rich.status.Status")
                assert "markup" not in called, path.name
                if called.endswith("TextColumn"):
                    assert "markup=False" in ast.unparse(node), path.name
