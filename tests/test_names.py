"""CSV files as customers' lists come, and what must not become a customer."""

import csv

import pytest
from test_desk import Here

from smark_jax.vault import names


def listed(path, content: str, *arguments, encoding: str = "utf-8", **options) -> list[str]:
    path.write_text(content, encoding=encoding, newline="")
    return names.from_csv(path, *arguments, **options).names


@pytest.mark.parametrize("heading", ["Kunde", "Company", "Full Name", "customer", " NAME "])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_column_of_names_is_found_by_its_heading_whatever_delimits_it(tmp_path, heading, delimiter):
    rows = [["Mail", heading], ["a@x.org", "Ada"], ["", ""], ["g@x.org", "王小明"]]
    content = "".join(delimiter.join(row) + "\r\n" for row in rows)
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        assert listed(tmp_path / "a.csv", content, encoding=encoding) == ["Ada", "王小明"]
    assert listed(tmp_path / "a.csv", f"{heading}\nAda\nGrace\n") == ["Ada", "Grace"]


def test_names_that_hold_a_delimiter_and_lists_without_a_heading(tmp_path):
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["Name", "city"], ["Ada", "London"], [], ["Lovelace, Countess; of", ""]])
    found = names.from_csv(path)
    assert found.names == ["Ada", "Lovelace, Countess; of"]
    assert "2 customers, 'Ada' to 'Lovelace, Countess; of', from the column 'Name', cut at a comma" in found.source
    assert listed(path, '"Acme; Inc"\n"Lovelace, Ada"\n') == ["Acme; Inc", "Lovelace, Ada"]
    assert listed(path, '"Name";"Ort"\n"Ada, Countess";"x"\n') == ["Ada, Countess"]
    assert "1 customer, 'Ada', from column 1, without a heading." in names.from_csv(_written(path, "Ada\n")).source


def _written(path, content):
    path.write_text(content)
    return path


def test_a_column_is_named_by_heading_or_number(tmp_path):
    path, content = tmp_path / "a.csv", "Empresa;Correo\nAda;a\nGrace;g\n"
    assert listed(path, content, "empresa") == ["Ada", "Grace"]
    assert listed(path, content, "1", heading=True) == ["Ada", "Grace"]
    assert listed(path, content, "2", heading=False) == ["Correo", "a", "g"]
    assert listed(path, "Ada,x\nGrace,y\n", "1") == ["Ada", "Grace"]
    assert listed(path, "Name,Company\nAda,x\n", "1") == listed(path, "Name,Company\nAda,x\n", "name") == ["Ada"]
    assert listed(path, "Mail\nAda\n", heading=False) == ["Mail", "Ada"]
    assert listed(path, "Mail\nAda\n", heading=True) == ["Ada"]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("Ada,London\nGrace,York\n", {}, "the columns 1 'Ada', 2 'London', cut at a comma.\n--column NAME-or-NUMBER"),
        ("Name,Company\nAda,x\n", {}, "the columns 1 'Name', 2 'Company'"),
        ("Name,Company\nAda,x\n", {"column": "3"}, "one column '3'"),
        ("Vorname;Nachname\nAda;L\n", {"column": "Nachnahme"}, "the columns 1 'Vorname', 2 'Nachname'"),
        ("Vorname;Straße\nAda;x\n", {"column": "2"}, "like a heading.\nSay --heading"),
        ("E-Mail\nAda\n", {}, "like a heading.\nSay --heading"),
        ("Lovelace, Ada\nHopper, Grace\n", {}, "the columns 1 'Lovelace', 2 'Ada'"),
        ("Ada\nHopper, Grace\n", {}, "1 in line 1 and 2 in line 2.\nPut quotes"),
        ("a;b,c\nd;e,f\n", {}, "a comma and a semicolon cut evenly"),
        ("Kunde;Mail\n", {}, "a heading alone"),
        ("\n \n", {}, "at least one name"),
        ('"open', {}, "Is a quote left open"),
        (
            'name,x\nAda,\n"Gr\u202eace",x\n,L\n"two\nlines",\nAda,\n',
            {},
            "line 3: .*; line 4: .*; line 6: .*; line 7: 'Ada'",
        ),
    ],
)
def test_a_file_that_leaves_doubt_is_refused(tmp_path, content, options, message):
    with pytest.raises(ValueError, match=f"(?s)^customers: expected .*{message}"):
        listed(tmp_path / "a.csv", content, **options)


def test_other_encodings_are_told_and_not_guessed(tmp_path):
    path = tmp_path / "a.csv"
    for encoding, message in (
        ("latin-1", r"other bytes in line 3.\nIt may be in Latin-1"),
        ("utf-16-le", "UTF-16 with"),
    ):
        with pytest.raises(ValueError, match=message):
            listed(path, "Name\nAda\nJürgen\n" if encoding == "latin-1" else "Name\nAda\n", encoding=encoding)


def test_both_commands_register_and_issue_nothing_from_a_file_in_doubt(tmp_path):
    """A German table's first line was a customer, who got a codeword and a copy."""
    import numpy as np

    desk = Here(tmp_path)
    np.savez(tmp_path / "base.npz", kernel=np.random.default_rng(0).normal(size=(60, 100)).astype(np.float32))
    desk.run("init", "vault")
    desk.run("add-model", "vault", "net", "base.npz", "--chips", 64)
    (tmp_path / "doubt.csv").write_text("Ada;ada@x.org\nGrace;grace@x.org\n")
    (tmp_path / "table.csv").write_text("Kunde;Mail\nAda;ada@x.org\nGrace;grace@x.org\n")
    desk.run("customers", "vault", "--csv", "doubt.csv", code=1)
    desk.run("issue", "vault", "net", "--csv", "doubt.csv", "--out", "copies", code=1)
    assert not (tmp_path / "copies").exists()
    assert desk.json("customers", "vault") == {"customers": [], "added": 0}
    desk.run("issue", "vault", "net", "--csv", "table.csv", "--out", "copies")
    assert "2 customers, 'Ada' to 'Grace', from the column 'Kunde', cut at a semicolon." in desk.stderr
    assert len(list((tmp_path / "copies").iterdir())) == 2
    assert desk.json("customers", "vault", "--csv", "doubt.csv", "--column", 2)["added"] == 2
    desk.run("customers", "vault", "--column", 2, code=2)
