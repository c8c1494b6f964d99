"""``python -m smark_jax.federation``: creates a participant's identity, and pins the apps that its client runs."""

import argparse
from pathlib import Path

from smark_jax.federation import guard, identities

_EXAMPLE = r"""example:
  python -m smark_jax.federation keygen clinic-a.identity >> roster.txt
  python -m smark_jax.federation guard guarded smark.smark-digits.0-1-0.1a2b3c4d.fab
  PATH="$PWD/guarded:$PATH" flower-supernode \
    --node-config 'smark-identity="clinic-a.identity" smark-roster="roster.txt"' ...
"""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m smark_jax.federation", epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    keygen = commands.add_parser("keygen", help="write a new identity, and print its public line for the roster")
    keygen.add_argument("file", type=Path)
    pin = commands.add_parser("guard", help="write a flwr-clientapp that runs these apps and no others")
    pin.add_argument("folder", type=Path, help="folder to put first in PATH when starting flower-supernode")
    pin.add_argument("bundles", type=Path, nargs="+", help=".fab files, as flwr build writes them")
    pin.add_argument("--add-mod", action="store_true", help="run them under this installation's masked_mod")
    options = parser.parse_args()
    try:
        if hasattr(options, "bundles"):
            print(guard.write(options.folder, options.bundles, add_mod=options.add_mod))
        else:
            print(f"{identities.create(options.file).hex()}  # {options.file.stem}")
    except FileExistsError as error:
        parser.error(f"{error.filename} exists; an identity is never overwritten" if "file" in options else str(error))
    except OSError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
