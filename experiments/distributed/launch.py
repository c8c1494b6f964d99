"""Runs parallel processes on one machine: when one fails or is late, all are stopped, and an error shows why."""

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence

_LAST_CHARACTERS = 3000


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run(commands: Sequence[Sequence[str]], timeout: float, *, show_first: bool = False) -> None:
    """Runs all commands at once, on CPU devices, until all have ended.

    Args:
      commands: an argument list for each process.
      timeout: seconds for all together.
      show_first: the first process writes to the terminal instead of into the error.

    Raises:
      RuntimeError: when a process fails, with the end of what it wrote, or when the time is over. None is left running.
    """
    deadline = time.monotonic() + timeout
    logs = [tempfile.TemporaryFile("w+") for _ in commands]
    running = []
    try:
        for index, (command, log) in enumerate(zip(commands, logs, strict=True)):
            output = None if show_first and index == 0 else log
            environment = os.environ | {"JAX_PLATFORMS": "cpu"}
            running.append(subprocess.Popen(command, stdout=output, stderr=output, env=environment))
        while any(process.poll() is None for process in running):
            late = time.monotonic() > deadline
            failed = [index for index, process in enumerate(running) if process.poll()]
            if late or failed:
                break
            time.sleep(0.05)
        failed = [index for index, process in enumerate(running) if process.poll()]
        unfinished = [index for index, process in enumerate(running) if process.poll() is None]
        if failed or unfinished:
            first = (failed or unfinished)[0]
            logs[first].seek(0)
            code = running[first].poll()
            what = f"ended with code {code}" if failed else f"did not end within {timeout:g} seconds"
            raise RuntimeError(f"process {first} of {len(running)} {what}:\n{logs[first].read()[-_LAST_CHARACTERS:]}")
    finally:
        for process in running:
            process.kill()
            process.wait()
        for log in logs:
            log.close()
