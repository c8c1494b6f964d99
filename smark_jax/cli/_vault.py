"""``smark init``, ``add-model`` and ``customers``."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from smark_jax import _validate
from smark_jax.cli import _added, _common, _names, _plan
from smark_jax.cli._common import AsJson, PassphraseFile, VaultPath, say

if TYPE_CHECKING:
    from smark_jax import carriers, files
    from smark_jax.vault import Vault, shapes, trials

_SHOWN = 50
# Beyond this share and number of bytes of a base, what is no weight is more than names, shapes and the network.
_MOST_OTHER, _MOST_OTHER_BYTES = 0.1, 2**20


def init(vault: VaultPath, passphrase_file: PassphraseFile = None, as_json: AsJson = False) -> None:
    """Make a vault: a folder with a new master key, sealed by your passphrase.

    Every secret is derived from that key. Without the passphrase nobody can open the vault, not even you. Keep it, and
    a copy of the folder, in a safe place.
    """
    secret = _common.passphrase(passphrase_file, new=True)
    from smark_jax.vault import crypto, folder

    if len(secret) < crypto.SHORTEST_PASSPHRASE:
        _common.warn(
            f"a passphrase of {len(secret)} characters can be guessed; take {crypto.SHORTEST_PASSPHRASE} or more."
        )
    with _common.err.status("making the vault"):
        folder.create(vault, secret)

    def words() -> None:
        say(f"A new vault is in {vault}. Back up the whole folder, and keep the passphrase apart from it.")
        say(f"Next: smark add-model {vault} NAME BASE")

    _common.show({"vault": str(vault)}, as_json, words)


def add_model(
    vault: VaultPath,
    name: Annotated[str, typer.Argument(help="A short name of your choice.", show_default=False)],
    base: Annotated[
        Path,
        typer.Argument(help="File of weights, in any format, or folder of a model.", show_default=False),
    ],
    chips: Annotated[int, typer.Option(min=1, help="Length of a fingerprint in bits.")] = 304,
    alpha: Annotated[
        float, typer.Option(help="Bound on the probability that one tracing accuses anybody innocent.")
    ] = 1e-6,
    change: Annotated[
        float | None,
        typer.Option(help="Relative change of the logits that a copy may cost; with --network. [default: 0.008]"),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="Strength of the mark. By default, --change or the weights determine it.")
    ] = None,
    match: Annotated[
        str | None, typer.Option(help="Mark only leaves whose names match this regular expression.")
    ] = None,
    public: Annotated[
        Path | None,
        typer.Option(
            help="The public weights that the base was trained from. Leaves that training did not change carry nothing."
        ),
    ] = None,
    probes: Annotated[
        Path | None,
        typer.Option(
            help="npz file with uint8 'images' [N, H, W, C]. Probes are made from them, to trace a suspect by its "
            "answers."
        ),
    ] = None,
    classes: Annotated[
        int | None, typer.Option(min=2, help="Number of the model's classes; required with --probes.")
    ] = None,
    network: _common.Network = None,
    images: _common.Images = None,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Add a base model. Its settings never change afterwards, since they are committed to.

    With --network, the first third of the images (48 or more in all) decides how far each weight may move, and the
    others the strength: copies may cost what --change says, and what they cost is printed. Without it no architecture
    is needed: weights move by a cautious share of their layer's RMS, and the cost is not measured.

    Only trained weights are marked. Running statistics, counters, position tables and scales of quantisers, which are
    recognised by name and content, are left alone. Anybody who has the base can remove the mark from a copy. If the
    base was trained from public weights, name them with --public, and the leaves that everybody has stay unmarked.
    """
    if (probes is None) != (classes is None):
        raise typer.BadParameter("--probes and --classes go together", param_hint="--probes")
    if change is not None and not 0 < change <= 1:
        raise typer.BadParameter("expected a share of the logits' RMS, above 0 and at most 1", param_hint="--change")
    if change is not None and ((network is None and images is None) or strength is not None):
        raise typer.BadParameter("--change goes with --network, and not with --strength", param_hint="--change")
    with _common.desk(vault, passphrase_file) as desk, _common.err.status("reading the base") as status:
        from smark_jax import files
        from smark_jax.vault import bases, image_files, models
        from smark_jax.vault import probes as images_to_ask

        weights = _base(base)
        leaves = weights.leaves
        form = _form(base, weights)
        pictures = image_files.pixels(probes) if probes else None
        runs = _common.runnable(network, images, base)
        models.refuse_taken(desk, name)
        known = _base(public).leaves if public else None
        chosen = _Chosen(chips, alpha, change, strength, models.choose(leaves, match, known))
        if form:  # refused now, and not after the network was measured
            bases.can_carry(form, chosen.spec)
        made = _made(desk, name, leaves, chosen, runs, status.update)
        asked = None
        if pictures is not None:  # before the model is added, so that a failure does not leave it without its probes
            status.update("making the probes")
            apply_fn = runs.apply_fn if runs else None
            asked = images_to_ask.make(desk, name, chips, pictures, files.nest(leaves), apply_fn)
        model = models.add(
            desk, name, leaves, num_chips=chips, alpha=alpha, made=made, match=match, public=known, form=form
        )
        if asked is not None and classes is not None:
            images_to_ask.keep(model, asked, classes)
        status.update("planning")
        added = _added.describe(model, made, asked is not None)
        expected = _plan.sentence(model)
    if public is None:
        _common.warn(
            "whoever has this base can take the mark out of a copy. If it was trained from public weights, name them "
            "with --public."
        )
    if form and form.other_bytes > max(_MOST_OTHER * form.num_bytes, _MOST_OTHER_BYTES):
        _common.warn(
            f"{form.other_bytes:,} of the base's {form.num_bytes:,} bytes are no weights, but perhaps an optimiser's "
            "state, and each copy will hold them as they are. If nobody should see them, add a file of the weights "
            "alone under another name."
        )
    if made.measured is None:
        _common.warn(
            f"nobody measured what copies of {name} cost: add it under another name with --network, and smark measures "
            "it and marks as strongly as the network bears."
        )
    _common.show(added, as_json, lambda: _added.show(vault, added, made, expected, weights.format))


class _Chosen(NamedTuple):
    """The owner's options, and the leaves that may carry."""

    chips: int
    alpha: float
    change: float | None
    strength: float | None
    spec: "carriers.Spec"


def _made(
    desk: "Vault",
    name: str,
    leaves: Mapping[str, Any],
    chosen: _Chosen,
    runs: "trials.Network | None",
    on_step: Callable[[str], None],
) -> "shapes.Made":
    """The shape and strength of a new model, after the checks that cost nothing."""
    from smark_jax import embedding
    from smark_jax.vault import models, shapes

    _validate.probability("add-model", "alpha", chosen.alpha)
    models.check_chips(chosen.chips, chosen.alpha)
    if chosen.strength is not None:
        models.check_strength("add-model", chosen.strength)
    if runs is None:
        return shapes.from_weights(leaves, chosen.spec, chosen.strength)
    change = embedding.MAX_CHANGE if chosen.change is None else chosen.change
    key, options = models.carrier_key(desk, name), {"max_change": change, "strength": chosen.strength}
    return shapes.from_network(key, leaves, chosen.spec, runs, chosen.chips, **options, on_step=on_step)


def _base(path: Path) -> "files.Weights":
    """Reads the owner's own model, of any size: a file, a folder of Hugging Face's or an Orbax checkpoint."""
    from smark_jax import files

    if path.is_dir() and not files.main_files(path):
        return files.read_checkpoint(path)
    folder = path if path.is_dir() else path.absolute().parent
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) if folder.is_dir() else 0
    return files.read(path, max_bytes=max(files.MAX_BYTES, size))


def _form(path: Path, weights: "files.Weights") -> "files.Form | None":
    """The form of the base as it was read; an Orbax checkpoint has none to be written in."""
    from smark_jax import files

    if not weights.sha256:
        return None
    form = files.Form(path)
    if form.sha256 != weights.sha256:
        cause = "Add it when nobody writes to it."
        raise _validate.fail("add-model", f"{path} as it was", "another content than was read", cause)
    return form


def customers(
    vault: VaultPath,
    csv: _names.Csv = None,
    column: _names.Column = None,
    heading: _names.Heading = None,
    add: Annotated[list[str] | None, typer.Option(help="Register a customer; repeatable.")] = None,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """List customers, after registering new ones, all or none.

    One registry serves all models; names may be in any script. A CSV file is refused, and nobody is registered, if it
    is not clear which names are meant.
    """
    listed_names = _names.read(csv, column, heading) + (add or [])
    with _common.desk(vault, passphrase_file) as desk:
        from smark_jax.vault import customers as registry
        from smark_jax.vault import store

        new = registry.add(desk, listed_names) if listed_names else []
        number = store.num_customers(desk.connection)
        listed = registry.registered(desk, 0 if as_json else number - _SHOWN)
        models = store.licensed_models(desk.connection)
    document = {
        "customers": [{**customer._asdict(), "models": models.get(customer.serial, [])} for customer in listed],
        "added": len(new),
    }

    def words() -> None:
        rows = [
            (str(c["serial"]), c["name"], c["created"], ", ".join(c["models"]) or "-") for c in document["customers"]
        ]
        if rows:
            keep = ("customer", "serial", "copies of", "since")
            _common.out.table(("serial", "customer", "since", "copies of"), rows, keep=keep)
        more = f", the last {_SHOWN} shown (--json prints all)" if number > _SHOWN else ""
        say(f"{number:,} customers{more}; {len(new):,} of them new.")

    _common.show(document, as_json, words)
