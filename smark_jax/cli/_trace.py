"""``smark trace`` and ``smark report``."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smark_jax.cli import _common, _outputs
from smark_jax.cli._common import Align, AsJson, PassphraseFile, VaultPath, VerdictNumber, say

if TYPE_CHECKING:
    from smark_jax.vault.documents import Suspect, Verdict


def trace(
    vault: VaultPath,
    name: _common.ModelName,
    suspects: Annotated[list[Path], typer.Argument(help="Files of weights, in any format.", show_default=False)],
    alpha: Annotated[
        float | None, typer.Option(help="Bound on the probability of a false accusation, if not the committed one.")
    ] = None,
    align: Align = None,
    rectify: Annotated[
        bool, typer.Option("--rectify", help="Read through pruning and regularisation; for models without a shape.")
    ] = False,
    leaf_map: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="BASE=SUSPECT",
            help="State which leaf of the suspect is which leaf of the base, when smark asks for it; repeatable.",
        ),
    ] = None,
    tried: Annotated[
        int,
        typer.Option(
            min=1,
            help="How many readings (--align, --rectify, --map) were tried on these suspects, including this one.",
        ),
    ] = 1,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Trace suspects: whose copies are these, and how certain is that?

    A suspect's verdict is "traced", "nobody" (no customer stands out), "not a copy" (alignment finds that it does not
    come from this base) or "undecided" (with the reason). The vault keeps the verdict under a number. Exit code 0 if
    every suspect was read, otherwise 1.
    """
    given = _common.pairs(leaf_map)
    with _common.desk(vault, passphrase_file) as desk:
        from smark_jax.vault import models, reading, verdicts

        model = models.get(desk, name)
        committed = model.settings.alpha
        if alpha is not None and alpha != committed:
            _common.warn(f"alpha {alpha:g} is not the committed one: evidence will still be judged at {committed:g}.")
        with _common.err.status("reading the base") as status:
            how = reading.Reading(_common.aligner(align), rectify, given)
            found = verdicts.trace(model, suspects, how, alpha=alpha, tried=tried, on_suspect=status.update)
    show(found, as_json, vault)


_MORE = ("error", "notes", "coverage", "left_out", "foreign", "log_maps")


def show(verdict: "Verdict", as_json: bool, vault: Path) -> None:
    """Prints a verdict, and exits with code 1 if a suspect could not be read."""
    from smark_jax.vault import documents

    rows = []
    for suspect in verdict.suspects:
        accused = [a._asdict() for a in suspect.accused]
        row = {"file": suspect.file, "verdict": suspect.verdict, "accused": accused}
        rows.append(row | {key: documents.plain(more) for key in _MORE if (more := getattr(suspect, key))})
    short = {key: getattr(verdict, key) for key in ("number", "model", "num_customers", "alpha")}
    _common.show({**short, "suspects": rows}, as_json, lambda: _words(verdict, vault))
    if any(suspect.verdict == "unreadable" for suspect in verdict.suspects):
        raise typer.Exit(1)


def _words(verdict: "Verdict", vault: Path) -> None:
    for suspect in verdict.suspects:
        _common.out.lines(_verdict(suspect, verdict.alpha))
        if suspect.decoys and suspect.decoys.alarm:
            say("  Do not rely on it: a codeword that nobody received stands out as well, so an assumption is broken.")
        for line in (*_reading(suspect), *(suspect.notes or ())):
            say(f"  {line}")
        if suspect.alignment:
            _common.out.lines(f"  {suspect.alignment}")
        if suspect.accused:
            _table(suspect)
    if verdict.number is None:
        say("No suspect could be read. No verdict was kept, and this does not count as an occasion.")
        return
    say(
        f"Verdict {verdict.number} on {verdict.model}: {verdict.num_customers:,} customers, alpha {verdict.alpha:g}, "
        f"occasion {verdict.occasion} of tracing this model."
    )
    if any(suspect.accused for suspect in verdict.suspects):
        say(f"Next: smark report {vault} {verdict.number} --out report.html")
        say(f"      smark evidence export {vault} {verdict.number} --out evidence.json")


def _reading(suspect: "Suspect") -> list[str]:
    """Lines on how the suspect was read; none if its leaves were read as they are."""
    lines = [f"{move.suspect} was read as {move.base} ({move.change})" for move in suspect.layout or ()]
    if suspect.left_out and suspect.coverage:
        coverage = suspect.coverage
        parts = ", ".join(f"{left.leaf} ({left.weights:,}: {left.reason})" for left in suspect.left_out)
        lines.append(f"{coverage.read:,} of {coverage.weights:,} carrying weights were read; left out: {parts}")
    if suspect.foreign:
        lines.append(f"left out, since they are not real numbers: {', '.join(suspect.foreign)}")
    if suspect.coverage and suspect.coverage.bounded > 0:
        then = "their influence was bounded" if suspect.coverage.bound else "they were left out"
        lines.append(f"{suspect.coverage.bounded:,} weights are too far from the base's to be a copy's; {then}")
    if suspect.log_maps:
        from smark_jax.vault.reading import maps_in_words

        lines.append(maps_in_words(suspect.log_maps))
    return lines


def _verdict(suspect: "Suspect", alpha: float) -> str:
    file, accused = suspect.file, suspect.accused
    if suspect.verdict == "unreadable":
        return f"{file}: could not be read. {suspect.error}"
    if suspect.verdict in ("not a copy", "undecided"):
        words = {"not a copy": "not a copy of this base", "undecided": "undecided"}[suspect.verdict]
        return f"{file}: {words}. {suspect.error}"
    if not accused:
        return f"{file}: nobody. No customer's fingerprint stands out at alpha = {alpha:g}."
    worst = _common.below(max(a.log10_p for a in accused))
    by_answers = suspect.read == "answers"
    if len(accused) == 1:
        whose = f"{accused[0].customer} (customer {accused[0].serial})"
        what = f"answers as the copy of {whose} does" if by_answers else f"a copy of {whose}"
        return f"{file}: {what}. The probability that an innocent customer is accused like this is {worst}."
    names = ", ".join(f"{a.customer} ({a.serial})" for a in accused)
    if by_answers:
        return f"{file}: answers as the copies of {len(accused)} customers do: {names}. Each p-value is {worst}."
    return f"{file}: mixed from the copies of {len(accused)} customers: {names}. Each p-value is {worst}."


def _table(suspect: "Suspect") -> None:
    rows = [
        (
            accused.customer,
            str(accused.serial),
            f"{abs(accused.statistic):.1f}",
            f"{suspect.threshold or math.inf:.1f}",
            _common.below(accused.log10_p),
            f"{accused.share:.0%}",
        )
        for accused in suspect.accused
    ]
    columns = ("customer", "serial", "|T|", "threshold", "p-value", "share")
    keep = ("customer", "serial", "p-value", "|T|", "threshold", "share")
    _common.out.table(columns, rows, keep=keep, figures=("serial", "|T|", "threshold", "share"))


def report(
    vault: VaultPath,
    verdict: VerdictNumber,
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Write a verdict as one HTML file that a lawyer can read, print and keep; it needs no network."""
    _outputs.check("--out", out, (passphrase_file,), vault)
    with _common.desk(vault, passphrase_file) as desk:
        from smark_jax import _io
        from smark_jax import report as reports
        from smark_jax.vault import documents, verdicts

        found = verdicts.get(desk, verdict, everybody=True)
        _outputs.check("--out", out, _outputs.suspects(found))
        _io.write(out, reports.render(documents.plain(found)).encode(), private=True)
    _common.show({"verdict": verdict, "report": str(out)}, as_json, lambda: say(f"Report: {out}"))
