"""Runs one Redis server and stops it when the process that started it is gone, however that process ended.

A separate program that needs only the standard library, started by `giantleap.service.supervisor.embedded_redis` as
`<parent pid> <server> <config>`. It polls its parent a few times a second, since a parent killed with SIGKILL can
notify nobody; on Linux the kernel also signals the server when the reaper itself dies.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from types import FrameType

_POLL_S = 0.2
_GRACE_S = 10.0
_PR_SET_PDEATHSIG = 1


def _die_with_reaper() -> None:
    """Runs between fork and exec of the server; safe because the reaper has a single thread, which lives to its end."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def main(parent_pid: int, command: list[str]) -> int:
    """Run `command` until it ends, SIGTERM arrives or the parent is gone; return the server's exit status."""
    stopping = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    # The lock on the data directory is an open descriptor that the server inherits and holds until it ends.
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, close_fds=False, preexec_fn=_die_with_reaper)
    while server.poll() is None and not stopping and os.getppid() == parent_pid:
        time.sleep(_POLL_S)
    if server.poll() is None:
        server.terminate()
        try:
            server.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            server.kill()
    return server.wait()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
