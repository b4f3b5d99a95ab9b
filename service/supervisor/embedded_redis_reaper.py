"""Runs one Redis server and takes it down when the process that wanted it is gone, however that ended.

A program of its own that needs only the standard library, started by `giantleap.service.supervisor.embedded_redis` as
`<parent pid> <server> <config>`. It looks at its parent a few times a second, since a parent killed with SIGKILL
can tell nobody; on Linux the server is also told by the kernel when this guard dies.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from types import FrameType

_LOOK_S = 0.2
_GRACE_S = 10.0
_PR_SET_PDEATHSIG = 1


def _die_with_guard() -> None:
    """Between fork and exec of the server; safe there since the guard has one thread, which lives as long as it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def main(parent_pid: int, command: list[str]) -> int:
    """Runs `command` until it ends, SIGTERM comes or the parent is gone; returns the server's exit status."""
    asked_to_stop = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal asked_to_stop
        asked_to_stop = True

    signal.signal(signal.SIGTERM, stop)
    # The lock on the data directory is an open descriptor that the server inherits: it is held as long as it lives.
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, close_fds=False, preexec_fn=_die_with_guard)
    while server.poll() is None and not asked_to_stop and os.getppid() == parent_pid:
        time.sleep(_LOOK_S)
    if server.poll() is None:
        server.terminate()
        try:
            server.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            server.kill()
    return server.wait()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
