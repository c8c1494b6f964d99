"""The ``smark`` command. Each command is a module of this folder; they are imported when they run."""

import json
import sys
from pathlib import Path
from typing import Annotated

import rich.console
import rich.markup
import typer

app = typer.Typer(
    name="smark",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Fingerprint every copy of an image classifier, and trace a leaked one.\n\n"
    "Example: [bold]smark demo --out out/demo[/bold]",
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and stop.")] = False,
) -> None:
    if version:
        from smark_jax import __version__

        print(f"smark {__version__}")
        raise typer.Exit


@app.command(
    epilog="Examples:\n\n  smark demo\n\n  smark demo --out out/demo --customers 50 --seed 3",
)
def demo(
    out: Annotated[Path, typer.Option(help="Folder for results.json and statistics.png; made if absent.")] = Path(
        "out/demo"
    ),
    parties: Annotated[int, typer.Option(min=1, max=64, help="Data holders that train together.")] = 4,
    customers: Annotated[int, typer.Option(min=3, help="Copies to issue, one for each customer.")] = 20,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training data.")] = 15,
    seed: Annotated[int, typer.Option(min=0, help="Of initialisation, shuffles and the demo's keys.")] = 0,
) -> None:
    """Train across parties, issue fingerprinted copies, leak three of them, and trace the leaks; about three minutes.

    Real digits (MNIST-5k, shipped with a package; nothing is downloaded), real training. Parties are accelerators where
    there are enough of them, and virtual CPU devices otherwise.
    """
    from smark_jax.cli import _demo

    _demo.run(_demo.Config(out, parties, customers, epochs, seed), rich.console.Console())


@app.command(
    epilog="Examples:\n\n  smark train --example > train.toml\n\n  smark train train.toml --out out/base\n\n"
    "Killed? The same command again goes on after the last checkpoint.",
)
def train(
    config: Annotated[Path | None, typer.Argument(help="TOML file; --example prints one.", show_default=False)] = None,
    out: Annotated[Path, typer.Option(help="Folder for base.safetensors and results; made if absent.")] = Path(
        "out/base"
    ),
    example: Annotated[bool, typer.Option("--example", help="Print a configuration with comments, and stop.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON; progress goes to stderr.")
    ] = False,
) -> None:
    """Train a base model across parties under masks, and go on where a killed run stopped.

    Writes base.safetensors, which add-model takes, results.json and training.png. The folder "private" in it holds what
    proves the owner's mark, and checkpoints while the training lasts: it goes to nobody.
    """
    from smark_jax.cli import _train_config

    if example:
        print(_train_config.EXAMPLE, end="")
        return
    if config is None:
        raise typer.BadParameter("name a configuration; smark train --example prints one", param_hint="CONFIG")
    settings = _train_config.read(config)
    from smark_jax.cli import _train

    console = rich.console.Console(stderr=as_json)
    results = _train.run(settings, out, console)
    if as_json:
        print(json.dumps(results))
    else:
        _train.show(console, out, results)


def main() -> None:
    """Entry point of the console script: errors that the library foresees are printed in one piece, exit code 1."""
    try:
        app()
    except (ValueError, ConnectionError, OSError, ImportError) as error:
        rich.console.Console(stderr=True).print(f"[bold red]smark:[/bold red] {rich.markup.escape(str(error))}")
        sys.exit(1)
