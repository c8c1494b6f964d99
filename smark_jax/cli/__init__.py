"""The ``smark`` command line. Each subcommand lives in a module of this folder; heavy imports wait until it runs."""

import gc
import io
import itertools
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from smark_jax import _foreign, errors
from smark_jax.cli import (
    _attack,
    _bench,
    _cache,
    _common,
    _draw,
    _evidence,
    _issue,
    _licence,
    _outputs,
    _plan,
    _query,
    _trace,
    _vault,
)
from smark_jax.cli._console import Console

app = typer.Typer(
    name="smark",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Fingerprint every copy of an image classifier, and trace a leaked one.\n\n"
    "Example: [bold]smark demo --out out/demo[/bold]",
    epilog="An owner's usual order: init, add-model, draw, issue, trace, report, evidence export.\n\n"
    "Exit codes: 0, success; 1, the command refused or failed (trace: a suspect could not be read; evidence verify: "
    "a check fails); 2, wrong usage. With --json, errors are JSON on stdout too.",
)
for _command, _examples in (
    (_vault.init, "smark init my-vault"),
    (
        _vault.add_model,
        "smark add-model my-vault mnist-cnn base.safetensors --network network:marking\n\n"
        "  smark add-model my-vault classifier classifier.onnx --network classifier.onnx --images images.npz\n\n"
        "  smark add-model my-vault mnist-cnn base.safetensors --network network:marking --change 0.02\n\n"
        "  smark add-model my-vault weights-only base.npz\n\n"
        "  smark add-model my-vault fine-tuned base.safetensors --public backbone.safetensors\n\n"
        "  smark add-model my-vault mnist-cnn base.npz --probes images.npz --classes 10 --network network:teaching",
    ),
    (
        _plan.plan,
        "smark plan my-vault mnist-cnn --customers 1000 --coalition 10\n\n"
        "  smark plan my-vault mnist-cnn --coalition 20 --change 0.02 --json",
    ),
    (
        _vault.customers,
        "smark customers my-vault\n\n  smark customers my-vault --csv customers.csv\n\n"
        "  smark customers my-vault --add Ada --add 'Grace Hopper'",
    ),
    (
        _draw.draw,
        "smark draw my-vault mnist-cnn --out draft.json --timestamp-request draft.tsq\n\n"
        "  smark draw my-vault mnist-cnn --token draft.tsr\n\n"
        "  smark draw my-vault mnist-cnn --beacon 'drand round 5711000: 8f4c...'\n\n"
        "  smark draw my-vault mnist-cnn",
    ),
    (
        _issue.issue,
        "smark issue my-vault mnist-cnn Ada 'Grace Hopper' --out copies\n\n"
        "  smark issue my-vault mnist-cnn --csv customers.csv --out copies --timestamp-request request.tsq\n\n"
        "  smark issue my-vault mnist-cnn --all --out copies --network network:running\n\n"
        "  smark issue my-vault mnist-cnn Ada --out copies --teach network:teaching\n\n"
        "  smark issue my-vault mnist-cnn --request ada.request --out packages",
    ),
    (
        _trace.trace,
        "smark trace my-vault mnist-cnn leaked.bin\n\n"
        "  smark trace my-vault mnist-cnn a.pt b.npz --align network:aligning --json",
    ),
    (_trace.report, "smark report my-vault 1 --out report.html"),
    (
        _query.query,
        "smark query my-vault mnist-cnn https://example.org/classify\n\n"
        "  smark query my-vault mnist-cnn 'python classify.py' --repeats 3",
    ),
    (
        _attack.attack,
        "smark attack copies/000003-Ada.safetensors leaked.safetensors --prune 0.5 --quantise 4\n\n"
        "  smark attack a.safetensors leaked.safetensors --mix b.safetensors --noise 0.1",
    ),
    (_bench.bench, "smark bench --weights 1000000 --customers 100000"),
):
    app.command(cls=_common.Command, epilog=f"Examples:\n\n  {_examples}")(_command)
app.add_typer(_evidence.app, name="evidence")
app.add_typer(_licence.app, name="licence")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and stop.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the traceback of every error.")] = False,
) -> None:
    context.ensure_object(dict)["verbose"] = verbose
    if version:
        from smark_jax import __version__

        print(f"smark {__version__}")
        raise typer.Exit


@app.command(
    cls=_common.Command,
    epilog="Examples:\n\n  smark demo\n\n  smark demo --out out/demo --customers 50 --seed 3",
)
def demo(
    out: Annotated[Path, typer.Option(help="Folder for results.json and statistics.png; made if absent.")] = Path(
        "out/demo"
    ),
    parties: Annotated[int, typer.Option(min=1, max=64, help="Data holders that train together.")] = 4,
    customers: Annotated[int, typer.Option(min=3, max=1_000_000, help="Copies to issue, one per customer.")] = 20,
    epochs: Annotated[int, typer.Option(min=1, max=1_000_000, help="Passes over the training data.")] = 8,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Seed of initialisation, shuffles and the demo's keys.")
    ] = 0,
) -> None:
    """Train across parties, issue fingerprinted copies, leak four of them, and trace the leaks; a minute or two.

    It trains on real digits (MNIST-5k, shipped with a package; nothing is downloaded). Parties run on accelerators if
    there are enough of them, and otherwise on virtual CPU devices.
    """
    if (out / "private").exists():
        raise typer.BadParameter(
            f"{out} holds a run of smark train, which the demo would overwrite", param_hint="--out"
        )
    from smark_jax.cli import _demo, _demo_show

    _demo_show.run(_demo.Config(out, parties, customers, epochs, seed), _common.out)


@app.command(
    cls=_common.Command,
    epilog="Examples:\n\n  smark train --example > train.toml\n\n  smark train train.toml --out out/base\n\n"
    "Killed? Run the same command again: it continues from the last checkpoint.",
)
def train(
    config: Annotated[Path | None, typer.Argument(help="TOML file; --example prints one.", show_default=False)] = None,
    out: Annotated[Path, typer.Option(help="Folder for base.safetensors and results; made if absent.")] = Path(
        "out/base"
    ),
    example: Annotated[bool, typer.Option("--example", help="Print a commented configuration, and stop.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON; progress goes to stderr.")
    ] = False,
) -> None:
    """Train a base model across parties under masks, or resume a run that was killed.

    Writes base.safetensors (the input of add-model), results.json and training.png.

    The subfolder "private" holds the proof of the owner's mark and, during training, checkpoints. Give it to nobody.
    """
    from smark_jax.cli import _train_config

    if example:
        print(_train_config.EXAMPLE, end="")
        return
    if config is None:
        raise typer.BadParameter("name a configuration; smark train --example prints one", param_hint="CONFIG")
    settings = _train_config.read(config)
    from smark_jax import training
    from smark_jax.cli import _train

    for name in training.OUTPUTS:
        _outputs.check("--out", out / name, (config,))
    console = Console(stderr=as_json)
    results = _train.run(settings, out, console)
    _common.show(results, as_json, lambda: _train.show(console, out, results, settings.test_split))


_REPORT = "Please report it to the project's issue tracker: the command, what you expected, and the traceback below."

# These are click's classes, or those of the copy of click inside newer versions of typer; typer's derive from either.
_UsageError: Any = typer.BadParameter.__mro__[1]
_ClickException: Any = typer.BadParameter.__mro__[2]


def main() -> None:
    """Entry point of the console script: prints an expected error as one message and exits with code 1.

    The text of an error is printed as plain text after the program's name. With ``--json`` it becomes a JSON document
    on stdout, in place of the result. An unexpected error is a bug of ours, so its traceback is printed.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot encode must not crash the program
            stream.reconfigure(errors="backslashreplace")
    _cache.keep_compiled()
    gc.set_threshold(100_000, 10, 10)  # a million customers are a million objects, which live until the command ends
    settings = {"verbose": False}
    try:
        code = app(standalone_mode=False, obj=settings)
    except _ClickException as error:
        if _as_json():
            _refuse("Usage", error.format_message())
        elif type(error).__name__ != "NoArgsIsHelpError":  # in that case the help was printed already
            from typer import rich_utils  # a tenth of a second, for help and errors alone

            usage = _UsageError(_foreign.clean(error.format_message()), getattr(error, "ctx", None))
            rich_utils.rich_format_error(usage)
        sys.exit(error.exit_code)
    except typer.Abort:
        _common.err.say("Aborted.", style="red")
        sys.exit(1)
    except (errors.SmarkError, OSError) as error:
        public = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ in (errors.__name__, "builtins")]
        _refuse(public[0], _at_desk(error), traceback.format_exc() if settings["verbose"] else "")
        sys.exit(1)
    except Exception as error:
        _refuse("Bug", f"a bug of smark, {type(error).__name__}: {error}\n{_REPORT}", traceback.format_exc())
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _as_json() -> bool:
    """Whether ``--json`` was given; looked up without parsing the options, since parsing may fail."""
    return "--json" in itertools.takewhile(lambda word: word != "--", sys.argv[1:])


def _at_desk(error: errors.SmarkError | OSError) -> str:
    """The wording of an error for command-line users."""
    if isinstance(error, errors.SmarkError):
        return error.desk
    if error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}. Is the name right, and may you read and write there?"
    return str(error)


def _refuse(kind: str, message: str, trace: str = "") -> None:
    """Prints an error on stderr, or as JSON on stdout; a traceback always goes to stderr."""
    if _as_json():
        print(_foreign.dumps({"error": {"kind": kind, "message": message}}))
    else:
        _common.err.lines(message, ("smark: ", "bold red"))
    if trace:
        _common.err.lines(trace.rstrip(), ("smark: ", "bold red"))
