"""What every experiment with sections promises."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import rich.console

from experiments.common import sections

CONSOLE = rich.console.Console(quiet=True)


def run_and_resume(tiny: Mapping[ModuleType, Any], out: Path) -> dict[str, dict[str, Any]]:
    """Runs each section at its tiny size, checks what it wrote, and that a second run takes the result from there."""
    documents = {}
    for section, config in tiny.items():
        name = section.__name__.rpartition(".")[2]
        document = sections.run_section(section, config, 0, out, CONSOLE)
        path = out / f"{name}.json"
        assert json.loads(path.read_text()) == json.loads(json.dumps(document))
        assert {"config", "parameters", "seed", "device", "seconds", "result"} <= document.keys()
        assert (out / f"{name}.png").stat().st_size > 1000
        written = path.stat().st_mtime_ns
        sections.run_section(section, config, 0, out, CONSOLE)
        assert path.stat().st_mtime_ns == written
        documents[name] = document
    return documents
