"""Tables at the widths at which people read them: the answer is never cut."""

import re
from types import SimpleNamespace

import pytest
import terminal

from smark_jax.cli import _common, _demo, _demo_show
from smark_jax.vault import documents

WIDTHS = [40, 60, 80, 120, None]  # None: into a pipe, where nobody says how wide it is


def result(customers: int = 20, accused: dict[int, tuple[int, ...]] | None = None) -> _demo.Results:
    """What ``smark demo`` stores, as a run of it did; ``accused`` changes whom some suspects are traced to."""
    leaks = ("fine-tuned 3 epochs", 7), ("pruned to 50 %", 11), ("quantised to 4 bits", 13), ("API, labels only", 17)
    owners = [*((f"copy {k}", k) for k in range(customers)), *leaks, ("independent API", None), ("independent", None)]
    rows = []
    for place, (name, customer) in enumerate(owners):
        right = () if customer is None else (customer,)
        found = (accused or {}).get(place, right)
        p_value, log10_p = (1.0, 0.0) if customer is None else (1e-66, -66.2)
        rows.append(_demo.Row(name, customer, 0.975, found, found == right, 17.2, p_value, log10_p, 5.8))
    return _demo.Results(
        base_accuracy=0.98,
        marked_accuracy_mean=0.9755,
        marked_accuracy_min=0.973,
        bit_errors=0,
        issued=customers,
        traced=customers,
        worst_p_value=1e-66,
        leaks_traced=4,
        innocents_accused=0,
        num_chips=304,
        alpha=1e-6,
        parties=4,
        epochs=8,
        seed=0,
        suspects=tuple(rows),
        strength=0.01,
        owner_mark_log10_p=-90.0,
        devices=("cpu",),
        seconds=65.0,
    )


def demo_table(tmp_path, **changes):
    return lambda: _demo_show.table(_common.out, _demo.Config(tmp_path, 4, 20, 8, 0), result(**changes))


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
@pytest.mark.parametrize("tty", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_demo_says_which_customer_leaked_at_every_width(width, tty, environment, tmp_path):
    text = terminal.shown(demo_table(tmp_path), width, tty=tty, **environment)
    lines = terminal.screen(text, width or 500)
    for customer in (7, 11, 13, 17):
        assert len([line for line in lines if re.search(f" customer {customer} +│$", line)]) == 1, text
    assert len([line for line in lines if " nobody " in line]) == 2
    assert "…" not in text
    assert "..." not in text
    assert f"Results: {tmp_path / 'results.json'}" in "".join(text.splitlines())
    rows = [line for line in lines if line.startswith("│")]
    assert all(len(line) == len(rows[0]) <= (width or (80 if tty else 500)) for line in rows)


def test_what_is_left_out_is_said_and_a_wide_table_leaves_out_nothing(tmp_path):
    narrow = terminal.shown(demo_table(tmp_path), 60, tty=True)
    assert "threshold" not in narrow.split("Not shown")[0]
    assert "Not shown, for want of room: " in narrow
    for width, tty in ((80, True), (None, False)):
        text = terminal.shown(demo_table(tmp_path), width, tty=tty)
        assert "Not shown" not in text
        for heading in ("suspect", "accuracy", "|T|", "threshold", "p-value", "verdict"):
            assert heading in text


def test_a_wrong_verdict_on_several_customers_stands_there_whole(tmp_path):
    text = terminal.shown(demo_table(tmp_path, accused={20: (1, 19)}), 60, tty=True)
    assert "customer 1, customer 19 (wrong)" in text.replace("\x1b[1;31m", "").replace("\x1b[0m", "")


def test_the_control_a_plain_table_of_rich_cuts_the_verdict(tmp_path):
    """The fault that these tests look for exists."""
    import rich.table

    def cut() -> None:
        table = rich.table.Table()
        for column in ("suspect", "accuracy", "|T|", "threshold", "p-value", "verdict"):
            table.add_column(column, no_wrap=True)
        for row in result().suspects:
            table.add_row(row.suspect, "0.975", "17.2", "5.8", "< 1e-66", f"customer {row.customer} (whole)")
        _common.out.print(table)

    assert "customer 17 (whole)" not in terminal.shown(cut, 60, tty=True)


def accusations(name: str, number: int = 3) -> SimpleNamespace:
    accused = [documents.Accused(f"{name} {k}", 123456, -16.7, 1e-90, -90.4, 0.5) for k in range(number)]
    return SimpleNamespace(threshold=5.3, accused=accused)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["Ada", "Grace Brewster Murray Hopper", "王小明" * 20])
def test_trace_names_the_accused_whole_at_every_width(width, name):
    from smark_jax.cli import _trace

    text = terminal.shown(lambda: _trace._table(accusations(name)), width, tty=False)
    cells = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
    assert [name.replace(" ", "") + str(k) for k in range(3)] == _joined(cells, 3)
    assert "…" not in text


def _joined(cells: list[str], number: int) -> list[str]:
    """The texts of a column whose cells may be folded: each ends with its number."""
    texts = [""]
    for cell in cells:
        texts[-1] += cell.replace(" ", "")
        if cell and cell[-1].isdigit():
            texts.append("")
    assert len(texts) == number + 1
    return texts[:-1]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_customer_of_many_models_keeps_the_name(width, tmp_path):
    """The list of models folds, and times are the first to go."""
    columns, keep = ("serial", "customer", "since", "copies of"), ("customer", "serial", "copies of", "since")
    models = ", ".join(f"model-{k}" for k in range(12))
    row = ("7", "Grace Hopper", "2026-11-25T19:05:46Z", models)
    text = terminal.shown(lambda: _common.out.table(columns, [row], keep=keep), width, tty=False)
    assert " Grace Hopper " in text
    assert ("2026-11-25T19:05:46Z" in text) == (width is None or width >= 60)
    assert all(f"model-{k}" in text for k in range(12))


def test_checks_and_verdicts_fold_to_the_right_of_their_signs():
    text = terminal.shown(lambda: _common.out.item(("FAILS", ""), "customers: " + "the leaf is another one, " * 9), 60)
    lines = terminal.screen(text, 60)
    assert lines[0].startswith("FAILS  customers: the leaf")
    assert len(lines) > 3
    assert all(line.startswith("       ") for line in lines[1:])
