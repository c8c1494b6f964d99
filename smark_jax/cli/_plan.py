"""``smark plan``, and what is expected of a model's copies, which ``add-model`` prints too."""

from typing import TYPE_CHECKING, Annotated

import typer

from smark_jax import _validate
from smark_jax.cli import _common
from smark_jax.cli._common import AsJson, PassphraseFile, VaultPath, say

if TYPE_CHECKING:
    from smark_jax import embedding
    from smark_jax.vault.models import OpenModel

CUSTOMERS = 1_000_000


def plan(
    vault: VaultPath,
    name: _common.ModelName,
    customers: Annotated[int, typer.Option(min=1, help="Number of customers among whom a verdict looks.")] = CUSTOMERS,
    coalition: Annotated[int, typer.Option(min=1, help="Number of colluders, all of whom should be accused.")] = 1,
    change: Annotated[
        float | None,
        typer.Option(
            help="Relative change of the logits that a copy may cost. By default, that of the model's own strength."
        ),
    ] = None,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Predict what can be traced with each number of chips, before the first copy is made.

    A lone leaker is accused by the statistic T: the table gives its expected value after several kinds of damage. A
    coalition mixes its copies: the table gives the largest one whose members are all accused with probability 95 %.
    More chips trace larger coalitions at the same cost in accuracy, and take more memory and time.
    """
    with _common.desk(vault, passphrase_file) as desk, _common.err.status("planning"):
        from smark_jax.vault import models

        model = models.get(desk, name)
        found = expected(model, customers, coalition, change)
        settings = model.settings
    document = {
        "model": name,
        "customers": customers,
        "coalition": coalition,
        "alpha": settings.alpha,
        "change": change,
        "threshold": found.threshold,
        "num_chips": found.num_chips,
        "rows": [row._asdict() for row in found.rows],
    }

    def words() -> None:
        strength = found.rows[0].strength
        _table(f"{name}: strength {strength:.3g}, {customers:,} customers, alpha {settings.alpha:g}", found)
        say(f"A lone leaker is accused from |T| = {found.threshold:.1f}.")
        if found.num_chips is None:
            say(f"No number of chips accuses {coalition:,} colluders here: accept a larger --change.")
        else:
            say(f"{found.num_chips:,} chips are enough for {coalition:,} colluders; {name} has {settings.num_chips:,}.")
        if found.num_chips != settings.num_chips:
            say("To use another number, add the model under another name with --chips.")

    _common.show(document, as_json, words)


def expected(
    model: "OpenModel", customers: int = CUSTOMERS, coalition: int = 1, change: float | None = None
) -> "embedding.Plan":
    """The plan for a model's own mark, or for one that costs ``change``."""
    from smark_jax import embedding

    settings, mark = model.settings, model.mark
    counted = {"customers": customers, "coalition": coalition, "alpha": settings.alpha}
    if change is None:
        return embedding.plan(mark, **counted)
    known = settings.shape.change if settings.shape else None
    if known is None:
        cause = "Add it under another name with --network, which measures what copies cost; or leave --change out."
        got = f"{model.name}, whose cost was never measured"
        raise _validate.fail("plan", "a model of known cost, for --change", got, cause)
    return embedding.plan(
        mark._replace(strength=settings.strength * embedding.MAX_CHANGE / known), max_change=change, **counted
    )


def sentence(model: "OpenModel") -> str:
    """What is expected of a lone leaker's copy, in words."""
    found = expected(model)
    row = next(row for row in found.rows if row.num_chips == model.settings.num_chips)
    after = ", ".join(f"{name} {value:.1f}" for name, value in row.statistic.items())
    text = f"Expected |T| of a copy: {after}. Among {CUSTOMERS:,} customers it takes {found.threshold:.1f} to accuse."
    if row.statistic["intact"] < found.threshold:
        text += (
            " Not even an intact copy will be traced: add the model under another name with more --chips or --strength."
        )
    return text


def _table(title: str, found: "embedding.Plan") -> None:
    damage = [name for name in found.rows[0].statistic if name != "float16"]
    rows = [
        (
            f"{row.num_chips:,}",
            *(f"{row.statistic[name]:.1f}" for name in damage),
            f"{row.coalition:,}",
            f"{row.coalition_after_noise:,}",
            *(f"{value:,.0f}" if value >= 10 else f"{value:.2g}" for value in (row.carrier_bytes / 1e6, row.seconds)),
        )
        for row in found.rows
    ]
    columns = ("chips", *damage, "coalition", "noisy", "MB", "seconds")
    keep = ("chips", "coalition", *damage, "noisy", "seconds", "MB")
    _common.out.table(columns, rows, keep=keep, figures=columns, title=title)
