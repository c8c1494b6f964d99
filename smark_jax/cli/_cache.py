"""Keeps compiled programs between commands: XLA compiles for longer than most commands compute."""

import contextlib
import hashlib
import os
import platform
import stat
import warnings
from pathlib import Path

_MOST_BYTES = 1 << 28
# Smaller programs compile as fast as they are found among many.
_LEAST_SECONDS = 0.05


def keep_compiled() -> None:
    """Names JAX a folder for compiled programs in the user's cache folder; call it before JAX is imported.

    ``SMARK_NO_CACHE`` switches it off, and a folder that the user named by JAX's own variable stays. Programs may hold
    what a network's function closes over, so nobody else may read the folder, and they run, so nobody else may write
    there. Where no such folder can be made, JAX compiles anew.
    """
    if {"SMARK_NO_CACHE", "JAX_COMPILATION_CACHE_DIR"} & os.environ.keys():
        return
    with contextlib.suppress(OSError, RuntimeError):  # a read-only home, or none
        caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
        if not caches.is_absolute():  # its specification says to ignore it
            caches = Path.home() / ".cache"
        caches.mkdir(parents=True, exist_ok=True)
        folder = caches / "smark-jax" / f"xla-{_processor()}"
        if not (_private(folder.parent) and _private(folder)):
            return
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(_MOST_BYTES))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", str(_LEAST_SECONDS))
        # Of a program that a killed command wrote in part; it is compiled anew.
        warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache", UserWarning)


def _private(folder: Path) -> bool:
    """Makes a folder that its owner alone may enter; whether it is ours, and no link: the caches may lie in /tmp."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        return False
    folder.chmod(0o700)
    return os.access(folder, os.W_OK)


def _processor() -> str:
    """Names this kind of processor: a home may be shared with others, whose programs would not run here."""
    flags = platform.processor()
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open() as lines:  # of hundreds of cores, one is read
        flags = next((line.rstrip() for line in lines if line.startswith(("flags", "Features"))), flags)
    return hashlib.sha256(f"{platform.machine()} {flags}".encode()).hexdigest()[:8]
