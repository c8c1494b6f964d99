"""``python -m smark_jax.federation keygen FILE``: an identity for a participant."""

import argparse
from pathlib import Path

from smark_jax.federation import identities

_EXAMPLE = """example:
  python -m smark_jax.federation keygen clinic-a.identity >> roster.txt
  flower-supernode --node-config 'smark-identity="clinic-a.identity" smark-roster="roster.txt"' ...
"""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m smark_jax.federation", epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    keygen = commands.add_parser("keygen", help="write a fresh identity, and print its public line for the roster")
    keygen.add_argument("file", type=Path)
    options = parser.parse_args()
    try:
        print(f"{identities.create(options.file).hex()}  # {options.file.stem}")
    except FileExistsError:
        parser.error(f"{options.file} exists; an identity is never overwritten")


if __name__ == "__main__":
    main()
