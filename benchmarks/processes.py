"""Processes that a benchmark starts. Each leads a session of its own, which is ended with everything that it started.

Servers start processes that outlive a parent which is only terminated: they are reparented to init and keep running.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

STOP_TIMEOUT_S = 30.0
_KILL_TIMEOUT_S = 10.0


@contextlib.contextmanager
def run_process(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
    output: IO[bytes] | int | None = None,
    pass_fds: Sequence[int] = (),
    stop_timeout_s: float = STOP_TIMEOUT_S,
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a process, and end it and all its descendants with the block.

    Args:
        command: Its command line.
        environment: Variables; None: those of this process.
        directory: Where it runs.
        output: Target of standard output and error; None: those of this process.
        pass_fds: Descriptors that it inherits.
        stop_timeout_s: Time between SIGTERM and SIGKILL.
    """
    process = subprocess.Popen(
        command, env=environment, cwd=directory, stdout=output, stderr=output, pass_fds=pass_fds, start_new_session=True
    )
    try:
        yield process
    finally:
        _end(process, stop_timeout_s)


def _end(process: "subprocess.Popen[bytes]", stop_timeout_s: float) -> None:
    started = _descendants(process)  # before the signal: an orphan has no parent to be found by
    _signal_group(process, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(stop_timeout_s)
    _signal_group(process, signal.SIGKILL)
    process.wait()
    for descendant in started:  # those in sessions of their own
        with contextlib.suppress(psutil.NoSuchProcess):
            descendant.kill()
    psutil.wait_procs(started, _KILL_TIMEOUT_S)


def _descendants(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    try:
        descendants: list[psutil.Process] = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return descendants


def _signal_group(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
