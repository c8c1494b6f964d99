"""``smark licence``: copies with a secret word that only the customer knows, and answers in a dispute."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smark_jax import _io, _validate
from smark_jax.cli import _common, _names, _outputs
from smark_jax.cli._common import AsJson, PassphraseFile, VaultPath, say

if TYPE_CHECKING:
    from smark_jax.licence.documents import Arbiter, SignedOffer
    from smark_jax.vault.wallets import Held, Wallet

app = typer.Typer(
    no_args_is_help=True,
    help="Licences whose customers hold a secret word, by which an owner can convict them and cannot frame them.",
    epilog="The order of things: init (customer), offer (owner), request (customer), smark issue --request (owner), "
    "open (customer). In a dispute: smark evidence export (owner), answer (customer or arbiter), smark evidence "
    "verify --answer (anybody).",
)

WalletPath = Annotated[Path, typer.Argument(help="The wallet's folder.", metavar="WALLET", show_default=False)]


@app.command(cls=_common.Command, epilog="Example:\n\n  smark licence init my-wallet")
def init(wallet: WalletPath, passphrase_file: PassphraseFile = None, as_json: AsJson = False) -> None:
    """Make a wallet: a folder with your identity, sealed by your passphrase. An arbiter makes one in the same way.

    Its fingerprint belongs into your licence contract: it says whose answers count. Back up the folder after every
    request: without it a copy cannot be opened, nor an accusation answered.
    """
    secret = _common.passphrase(passphrase_file, new=True)
    from smark_jax.vault import crypto, wallets

    if len(secret) < crypto.SHORTEST_PASSPHRASE:
        _common.warn(
            f"a passphrase of {len(secret)} characters can be guessed; take {crypto.SHORTEST_PASSPHRASE} or more."
        )
    made = wallets.create(wallet, secret)
    public, key = wallet / wallets.PUBLIC, made.identity.public.identity

    def words() -> None:
        say(f"A new wallet is in {wallet}. Its fingerprint, for the contract:")
        say(f"  {key}")
        say(f"{public} is for customers who name you as their arbiter. Next: smark licence request {wallet} OFFER")

    _common.show({"wallet": str(wallet), "fingerprint": key, "public": str(public)}, as_json, words)


@app.command(
    cls=_common.Command,
    epilog="Examples:\n\n  smark licence offer my-vault mnist-cnn Ada 'Grace Hopper' --out offers\n\n"
    "  smark licence offer my-vault mnist-cnn --csv customers.csv --out offers --choices 2048",
)
def offer(
    vault: VaultPath,
    name: _common.ModelName,
    out: Annotated[Path, typer.Option(help="Folder for the offers; made if absent.", show_default=False)],
    customers: _names.Customers = None,
    csv: _names.Csv = None,
    column: _names.Column = None,
    heading: _names.Heading = None,
    choices: Annotated[int, typer.Option(min=64, max=65536, help="Length of the secret word in bits.")] = 4096,
    parts: Annotated[int, typer.Option(min=1, max=256, help="Disputes that a licence bears: each opens a part.")] = 8,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Offer customers a licence: one file each, under which the customer requests its copy.

    Customers get a codeword and a commitment at once. Asking again writes the same offers.
    """
    _outputs.check("--out", out, vault=vault, folder=True)
    names = [*(customers or []), *_names.read(csv, column, heading)]
    if not names:
        raise typer.BadParameter("name customers, or pass --csv", param_hint="CUSTOMER")
    with _common.desk(vault, passphrase_file) as desk:
        from smark_jax.vault import _text, commitments, licensing, models
        from smark_jax.vault import customers as registry

        model = models.get(desk, name)
        chosen = sorted(set(registry.resolve(desk, list(dict.fromkeys(names)))))
        made = licensing.offer(model, chosen, choices, parts)
        plain = licensing.without_word(model, chosen)
        out.mkdir(parents=True, exist_ok=True)
        files = []
        for customer, content in made:
            files.append(out / _text.file_name(customer.serial, customer.name, ".offer"))
            _io.write(files[-1], content)
        newest = commitments.latest(desk, name)
    assert newest is not None
    if plain:
        _common.warn(
            f"copies without a secret word were made before for {', '.join(plain)}. If such a copy leaks, the word is "
            "not in it: ask for none then (smark evidence export --parts 0)."
        )

    def words() -> None:
        say(f"Offers are in {out}. Publish the root of commitment {newest.number} before you send them:")
        say(f"  {newest.root}")
        say(f"Each customer answers with a request. Then: smark issue {vault} {name} --request REQUEST --out packages")

    document = {
        "offers": list(map(str, files)),
        "commitment": newest.number,
        "root": newest.root,
        "without_word": plain,
    }
    _common.show(document, as_json, words)


@app.command(
    cls=_common.Command,
    epilog="Examples:\n\n  smark licence request my-wallet 000003-Ada.offer --out ada.request\n\n"
    "  smark licence request my-wallet 000003-Ada.offer --out ada.request --deposit arbiter.json",
)
def request(
    wallet: WalletPath,
    offer: Annotated[Path, typer.Argument(help="The owner's offer.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The request to write.", show_default=False)],
    deposit: Annotated[
        Path | None,
        typer.Option(help="An arbiter's public.json: deposit your openings with it, sealed, so that it can answer."),
    ] = None,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Draw a secret word, and request a copy that carries it. The owner cannot learn the word from the request."""
    _outputs.check("--out", out, (offer, deposit, passphrase_file), wallet)
    signed, arbiter = _read_offer(offer), _read_arbiter(deposit)
    with _opened(wallet, passphrase_file) as mine:
        from smark_jax.licence import documents
        from smark_jax.vault import wallets

        with _common.err.status("drawing a word"):
            held = wallets.request(mine, signed, arbiter)
        _io.write(out, documents.dumps(held.file))
    _show_request(held, out, wallet, as_json)


@app.command(
    "open",
    cls=_common.Command,
    epilog="Example:\n\n  smark licence open my-wallet 000003-Ada.package --out model.safetensors",
)
def open_package(
    wallet: WalletPath,
    package: Annotated[Path, typer.Argument(help="The owner's package.", show_default=False)],
    out: Annotated[
        Path, typer.Option(help="The copy to write: a file, or a folder where the base is one.", show_default=False)
    ],
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Open a package: your copy of the model, in the form of its base, with your secret word in it.

    If the package is damaged, say no more to the owner than that, and use complain.
    """
    _outputs.check("--out", out, (package, passphrase_file), wallet, folder=out.is_dir())
    with _opened(wallet, passphrase_file) as mine:
        from smark_jax.vault import wallets

        with _common.err.status("opening the package"):
            held, head = wallets.receive(mine, package.read_bytes(), str(package), lambda suffix: _named(out, suffix))
    about = held.request.offer.offer

    def words() -> None:
        say(f"{out} is your copy of {about.model}. Back up {wallet}: it alone can answer an accusation.")

    _common.show({"copy": str(out), "model": about.model, "created": head.created}, as_json, words)


@app.command(
    cls=_common.Command,
    epilog="Example:\n\n  smark licence complain my-wallet 000003-Ada.package --out ada-2.request",
)
def complain(
    wallet: WalletPath,
    package: Annotated[Path, typer.Argument(help="The damaged package.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The new request to write.", show_default=False)],
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Request again after a damaged package, with a new word. The request says nothing of where the damage was."""
    _outputs.check("--out", out, (package, passphrase_file), wallet)
    with _opened(wallet, passphrase_file) as mine:
        from smark_jax.licence import documents
        from smark_jax.vault import wallets

        held = wallets.complain(mine, package.read_bytes(), str(package))
        _io.write(out, documents.dumps(held.file))
    _show_request(held, out, wallet, as_json)


@app.command(cls=_common.Command, epilog="Example:\n\n  smark licence answer my-wallet evidence.json --out ada.answer")
def answer(
    wallet: WalletPath,
    bundle: Annotated[Path, typer.Argument(help="The owner's evidence.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The answer to write.", show_default=False)],
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Open the part of your secret word that a bundle asks for; an arbiter opens what was deposited with it.

    If the suspect was not made from your copy, the answer shows that: it does not carry your word. A wallet opens no
    part for a second bundle.
    """
    _outputs.check("--out", out, (bundle, passphrase_file), wallet)
    with _opened(wallet, passphrase_file) as mine:
        from smark_jax.licence import documents
        from smark_jax.vault import wallets

        found = wallets.answer(mine, bundle)
        _io.write(out, documents.dumps(documents.AnswerFile(found.given)))
    opened = [one for signed in found.given for one in signed.answer.opened]
    parts = [one.part for one in opened]
    for customer, why in found.lacking:
        _common.warn(f"nothing of the word of {customer} is opened: {why}")
    if any(one.ephemeral for one in opened):
        _common.warn(
            "before you hand it over, ask the accused whether it has opened the same part for another bundle "
            "('smark licence status'): a part proves nothing to whoever knows it."
        )

    def words() -> None:
        say(f"{out} opens part {' and '.join(map(str, parts))} of the word, for this bundle alone.")
        say(f"Anybody can check it: smark evidence verify {bundle} SUSPECT BASE --answer {out}")

    _common.show({"answer": str(out), "parts": parts, "lacking": dict(found.lacking)}, as_json, words)


@app.command(cls=_common.Command, epilog="Example:\n\n  smark licence status my-wallet")
def status(wallet: WalletPath, passphrase_file: PassphraseFile = None, as_json: AsJson = False) -> None:
    """List the licences of a wallet, and how much of each word has been opened."""
    with _opened(wallet, passphrase_file) as mine:
        from smark_jax.licence import documents
        from smark_jax.vault import wallets

        held, given = wallets.held(mine), wallets.given(mine)
        key = mine.identity.public.identity
    rows = []
    for one in held:
        offer, digest = one.request.offer.offer, documents.digest(one.request.request)
        opened = sorted({part for item in given if item.request == digest for part in item.parts})
        rows.append(
            {
                "model": offer.model,
                "customer": offer.customer,
                "attempt": one.request.request.attempt,
                "state": one.state,
                "parts": offer.num_parts,
                "opened": opened,
            }
        )

    def words() -> None:
        say(f"Fingerprint: {key}")
        columns = ("model", "customer", "attempt", "state")
        opened = [f"{len(row['opened'])} of {row['parts']}" for row in rows]
        table = [(*(str(row[name]) for name in columns), part) for row, part in zip(rows, opened, strict=True)]
        _common.out.table((*columns, "parts opened"), table, keep=("state", "model"), figures=("attempt",))

    _common.show({"fingerprint": key, "licences": rows}, as_json, words)


def _opened(wallet: Path, passphrase_file: Path | None) -> "AbstractContextManager[Wallet]":
    secret = _common.passphrase(passphrase_file)
    from smark_jax.vault import wallets

    return wallets.opened(wallet, secret)


def _read_offer(path: Path) -> "SignedOffer":
    from smark_jax.licence import documents

    return documents.loads(documents.SignedOffer, _content(path), str(path))


def _read_arbiter(path: Path | None) -> "Arbiter | None":
    from smark_jax.licence import documents

    return None if path is None else documents.loads(documents.Arbiter, _content(path), str(path))


def _content(path: Path) -> bytes:
    from smark_jax.licence import documents

    with path.open("rb") as file:
        return file.read(documents.LARGEST + 1)


def _named(out: Path, form: Path) -> Path:
    """Refuses a name that says another format than the base's form has."""
    suffix = form.name
    if suffix and not out.name.endswith(suffix):
        got, cause = f"{out.name}", f"Your copy has the form of the owner's base: name it, say, {out.stem}{suffix}."
        raise _validate.fail("licence", f"a name that ends with {suffix}", got, cause)
    return out


def _show_request(held: "Held", out: Path, wallet: Path, as_json: bool) -> None:
    from smark_jax.licence import documents

    offer, request = held.request.offer.offer, held.request.request
    name = documents.digest(request)

    def words() -> None:
        attempt = f", attempt {request.attempt}" if request.attempt > 1 else ""
        say(f"{out} requests {offer.model} for {offer.customer}{attempt}: {offer.num_segments:,} hidden choices.")
        say(f"Back up {wallet} now, and send the request to the owner, whose key is {offer.public_key}.")

    about = {"request": str(out), "digest": name, "attempt": request.attempt, "owner": offer.public_key}
    _common.show(about, as_json, words)


def pack(
    vault: Path,
    name: str,
    files: list[Path],
    out: Path,
    passphrase_file: Path | None,
    as_json: bool,
    *,
    alone: bool,
) -> None:
    """``smark issue --request``: a package for each request."""
    if not alone:
        raise typer.BadParameter("a request names its customer and goes with no other option", param_hint="--request")
    from smark_jax.licence import documents

    requests = [(str(path), documents.loads(documents.RequestFile, _content(path), str(path))) for path in files]
    with _common.desk(vault, passphrase_file) as desk:
        from smark_jax.vault import licensing, models

        with _common.bar(f"packing {name}", len(requests)) as done:
            packed = licensing.pack(models.get(desk, name), requests, out, on_step=done)

    def words() -> None:
        say(f"Packages are in {out}:")
        for one in packed:
            say(f"  {one.file.name} for {one.customer}" + (f", attempt {one.attempt}" if one.attempt > 1 else ""))
        say("Each can be opened by its customer's wallet alone: smark licence open WALLET PACKAGE --out COPY")

    rows = [one._replace(file=str(one.file))._asdict() for one in packed]  # pyright: ignore[reportArgumentType]
    _common.show({"packages": rows}, as_json, words)
