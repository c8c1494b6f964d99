"""``smark evidence``: bundles for an arbiter, and time stamps of commitments."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smark_jax import _io
from smark_jax.cli import _common, _outputs
from smark_jax.cli._common import Align, AsJson, PassphraseFile, VaultPath, VerdictNumber, say

if TYPE_CHECKING:
    from smark_jax.vault.evidence import Pieces

app = typer.Typer(no_args_is_help=True, help="Evidence for an arbiter: export a bundle, verify one, keep time stamps.")


@app.command(cls=_common.Command, epilog="Example:\n\n  smark evidence export my-vault 1 --out evidence.json")
def export(
    vault: VaultPath,
    verdict: VerdictNumber,
    out: Annotated[Path, typer.Option(help="The bundle to write.", show_default=False)],
    suspect: Annotated[
        int | None, typer.Option(min=1, help="Which suspect of the verdict, if several were traced.")
    ] = None,
    commitment: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Open all codewords under this commitment, not each under the one its customer was licensed with.",
        ),
    ] = None,
    parts: Annotated[
        int,
        typer.Option(
            min=0, max=256, help="Parts of its secret word to ask of an accused who has one; each is opened only once."
        ),
    ] = 1,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Write a signed bundle with which an arbiter can recompute an accusation; it opens only the accused's codewords.

    Where the model has a shape, its file is written beside the bundle; the bundle names it, and verify looks for it
    there.

    The bundle also opens a part of the model's carrier, the smallest share that suffices: an eighth, a quarter, half or
    all. Which pieces follows from the suspect, so that nobody chooses them. It says how much stays secret. Where all
    had to be opened, add the model under another name before issuing more copies.
    """
    _outputs.check("--out", out, (passphrase_file,), vault)
    with _common.desk(vault, passphrase_file) as desk:
        from smark_jax.vault import evidence, shapes, verdicts

        _outputs.check("--out", out, _outputs.suspects(verdicts.get(desk, verdict)))
        exported = evidence.export(desk, verdict, suspect, commitment, parts)
        shape = shapes.write(out.parent, exported.shape) if exported.shape else None
        _io.write(out, exported.content, private=True)

    def words() -> None:
        beside = f"{shape}, which belongs in the same folder, " if shape else ""
        say(f"{out} accuses {', '.join(exported.accused)}. Hand it over with {beside}the suspect and the base.")
        say(f"Anybody can check it: smark evidence verify {out} SUSPECT BASE --commitment FILE-or-ROOT")
        numbers = " and ".join(map(str, exported.commitments))
        several = ", each by a --commitment of its own" if len(exported.commitments) > 1 else ""
        say(f"FILE-or-ROOT is commitment {numbers} as you published it before the sale{several}.")
        for name, some in exported.asked:
            say(f"{name} is asked to open part {' and '.join(map(str, some))} of its secret word. Its answer:")
            say(f"  smark licence answer WALLET {out} --out ANSWER, which verify takes by --answer")
        say(_opens(exported.pieces))

    for name in exported.left_out:
        _common.warn(f"{name} was left out: an arbiter cannot repeat the search on which that accusation rests.")
    document = {
        "bundle": str(out),
        "shape": str(shape) if shape else None,
        "accused": exported.accused,
        "left_out": exported.left_out,
        "commitments": exported.commitments,
        "asked": dict(exported.asked),
        "pieces": exported.pieces,
    }
    _common.show(document, as_json, words)


def _opens(pieces: "Pieces | None") -> str:
    """States how much of the carrier a bundle opens."""
    burnt = (
        "whoever sees it can erase fingerprints from every copy. Add the model under another name for new customers."
    )
    if pieces is None:
        return f"It opens the model's whole carrier, which has no pieces: {burnt}"
    if pieces.opened == pieces.of:
        why = "no part of it suffices" if pieces.of > 1 else "it is too small to be opened in part"
        return f"It opens the model's whole carrier, since {why}: {burnt}"
    earlier = "" if pieces.secret == pieces.of - pieces.opened else ", since earlier bundles opened others"
    return (
        f"It opens {pieces.opened} of the {pieces.of} pieces of the model's carrier; {pieces.secret} of {pieces.of} "
        f"pieces stay secret{earlier}. Copies can still be traced by these."
    )


@app.command(
    cls=_common.Command,
    epilog="Example:\n\n  smark evidence verify evidence.json leaked.bin base.safetensors --commitment m-1.json",
)
def verify(
    bundle: Annotated[Path, typer.Argument(help="The evidence.", show_default=False)],
    suspect: Annotated[Path, typer.Argument(help="The model in dispute.", show_default=False)],
    base: Annotated[Path, typer.Argument(help="The model that copies were made from.", show_default=False)],
    commitment: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE-or-ROOT", help="What the owner published before the sale; repeatable."),
    ] = None,
    largest_alpha: Annotated[
        float, typer.Option(help="The highest committed alpha that you accept, above 0 and below 1.")
    ] = 1e-3,
    answer: Annotated[
        list[Path] | None, typer.Option(help="What the accused, or its arbiter, answered; repeatable.")
    ] = None,
    align: Align = None,
    as_json: AsJson = False,
) -> None:
    """Recompute an accusation, without a vault. Exit code 0 if everything holds, otherwise 1."""
    with _common.err.status("reading the bundle") as status:
        from smark_jax.vault import convicting, verification

        roots = [verification.published_root(source) for source in commitment or ()]
        found = verification.verify(
            bundle,
            suspect,
            base,
            root=roots,
            largest_alpha=largest_alpha,
            aligner=_common.aligner(align),
            answers=convicting.read_answers(answer or ()),
            on_step=status.update,
        )
    document = {
        "holds": found.holds,
        "compared_with_published_root": found.compared,
        "model": found.header.model,
        "alpha": found.header.alpha,
        "largest_alpha": found.largest_alpha,
        "num_customers": found.num_customers,
        "root": found.root,
        "checks": found.checks,
        "accused": found.accused,
        "convicted": found.convicted,
        "statements": found.statements,
    }

    def words() -> None:
        for check in found.checks:
            sign = ("holds", "green") if check.holds else ("FAILS", "bold red")
            _common.out.item(sign, f"{check.name}: {check.detail}")
        names = ", ".join(a.customer for a in found.accused)
        say(
            f"Everything holds: the model is from the copy of {names}."
            if found.holds
            else "The evidence does not hold."
        )
        for one in found.convicted:
            say(f"It carries the secret word of {one.customer}, which the owner did not know.")
        say("Taken on trust:")
        for statement in found.statements:
            _common.out.item(("", ""), statement)

    _common.show(document, as_json, words)
    if not found.compared:
        _common.warn(
            "the root was NOT compared with a published one. An owner could have chosen keys or customers afterwards: "
            "ask for what was published before the sale, and pass it with --commitment."
        )
    if not found.holds:
        raise typer.Exit(1)


@app.command(cls=_common.Command, epilog="Example:\n\n  smark evidence timestamp my-vault mnist-cnn 1 response.tsr")
def timestamp(
    vault: VaultPath,
    name: _common.ModelName,
    number: Annotated[int, typer.Argument(min=1, max=2**63 - 1, help="The commitment's number.", show_default=False)],
    response: Annotated[Path, typer.Argument(help="What the authority answered (DER).", show_default=False)],
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Keep an RFC 3161 time stamp with its commitment, for later evidence.

    It must be about the file in the vault's folder "commitments". To check the authority's signature, use 'openssl ts
    -verify' with the authority's certificate.
    """
    with _common.desk(vault, passphrase_file) as desk:
        from smark_jax.vault import commitments, models, timestamps

        commitment = commitments.get(desk, models.get(desk, name).name, number)
        time = timestamps.add(desk, commitment, response.read_bytes())
    document = {"model": name, "number": number, "time": time}
    _common.show(document, as_json, lambda: say(f"Commitment {number} to {name} was stamped at {time}."))
