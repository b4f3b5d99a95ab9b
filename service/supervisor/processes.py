"""The processes of one host: started, started again when they end, and restarted one by one for new settings.

Nothing here waits: `giantleap.service.supervisor.supervisor` calls `ProcessManager.poll` again and again. Restarts are
counted in a file that `/metrics` reads (`giantleap.service.telemetry.metrics.RestartCollector`).
"""

import logging
import os
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from giantleap.service.errors import EXIT_BAD_CONFIGURATION, EXIT_HUNG
from giantleap.service.telemetry.metrics import write_restarts

log = logging.getLogger(__name__)

_HEALTHY_AFTER_S = 30.0
_MAX_CRASHES = 5
_KILL_AFTER_S = 5.0


@dataclass(slots=True)
class ManagedProcess:
    """One supervised process.

    Attributes:
        name: Its name in the log.
        argv: Arguments of `giantleap`; the first is its role.
        keep_fds: Descriptors that it inherits.
        process: What runs, if anything does.
        started_at_s: Monotonic time of the last start.
        crashes: How often it ended by itself since it last stayed up.
        restart_at_s: Monotonic time of the next start.
        grace_s: How long the running process may drain.
        kill_at_s: Set while it drains for a restart: monotonic time at which it is killed.
        ready_fd: The pipe on which the running process reports that it is ready.
        is_ready: Whether the running process has reported that.
        was_ready: Whether any process of this name has.
    """

    name: str
    argv: tuple[str, ...]
    keep_fds: tuple[int, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    started_at_s: float = 0.0
    crashes: int = 0
    restart_at_s: float = 0.0
    grace_s: float = 0.0
    kill_at_s: float | None = None
    ready_fd: int | None = None
    is_ready: bool = False
    was_ready: bool = False

    @property
    def role(self) -> str:
        """`api` or `worker`."""
        return self.argv[0]

    def read_ready(self) -> None:
        """Read the report of readiness, if it has arrived."""
        if self.ready_fd is not None and select.select([self.ready_fd], [], [], 0)[0]:
            if os.read(self.ready_fd, 1):
                self.is_ready = self.was_ready = True
            self.close_ready()

    def close_ready(self) -> None:
        """Close the pipe, if it is open."""
        if self.ready_fd is not None:
            os.close(self.ready_fd)
        self.ready_fd = None


@dataclass(frozen=True, slots=True)
class Launch:
    """The environment that processes start with, and how long they may drain."""

    environment: Mapping[str, str]
    grace_s: float


def plan_restart(crashes: int, ran_s: float) -> tuple[int, float]:
    """Crash count and delay in seconds after a process ended by itself: 1, 2, 4, 8, ... s, reset by a healthy run."""
    crashes = 1 if ran_s >= _HEALTHY_AFTER_S else crashes + 1
    return crashes, float(min(2 ** (crashes - 1), 30))


def to_reason(code: int) -> str:
    """Why a process ended, from its exit code, as a label: hung, killed, crashed or stopped."""
    if code == EXIT_HUNG:
        return "hung"
    return "killed" if code < 0 else "crashed" if code else "stopped"


class ProcessManager:
    """The processes of one host.

    Args:
        children: What to run: workers and API processes.
        launch: What they start with.
        lifeline_fd: The read end of the pipe that closes when this process ends.
        shared_dir: Where restarts are counted for the process that answers `/metrics`.
        command: What runs `giantleap`; tests give another.
    """

    def __init__(
        self,
        children: Sequence[ManagedProcess],
        launch: Launch,
        lifeline_fd: int,
        shared_dir: Path,
        command: tuple[str, ...] = (sys.executable, "-m", "giantleap"),
    ) -> None:
        self._children = children
        self._launch = launch
        self._lifeline_fd = lifeline_fd
        self._shared_dir = shared_dir
        self._command = command
        self._restarts: dict[str, Counter[str]] = {"api": Counter(), "worker": Counter()}
        self._to_restart: list[ManagedProcess] = []
        self._restarting: ManagedProcess | None = None
        write_restarts(shared_dir, self._restarts)

    def poll(self) -> int | None:
        """Start what is due, note what has ended, take the next step of a rolling restart.

        Returns:
            The exit code with which to give up, or None.
        """
        for child in self._children:
            if child.process is None:
                if time.monotonic() >= child.restart_at_s:
                    self._start(child)
                continue
            child.read_ready()
            code = child.process.poll()
            if code is None:
                if child.kill_at_s is not None and time.monotonic() >= child.kill_at_s:
                    log.warning("%s did not drain within its grace period; killing it", child.name)
                    child.process.kill()
                continue
            child.process = None
            child.close_ready()
            if child.kill_at_s is not None:
                child.kill_at_s, child.restart_at_s, child.crashes = None, 0.0, 0
            elif (exit_code := self._after_exit(child, code)) is not None:
                return exit_code
        self._roll()
        return None

    def _after_exit(self, child: ManagedProcess, code: int) -> int | None:
        if code == EXIT_BAD_CONFIGURATION and not child.was_ready:
            log.error("%s cannot start: its configuration is wrong (see above)", child.name)
            return EXIT_BAD_CONFIGURATION
        self._restarts[child.role][to_reason(code)] += 1
        write_restarts(self._shared_dir, self._restarts)
        child.crashes, delay_s = plan_restart(child.crashes, time.monotonic() - child.started_at_s)
        if child.crashes > _MAX_CRASHES and not child.was_ready:
            log.error("%s ended %d times in a row, last with code %d: giving up", child.name, child.crashes, code)
            return 1
        log.warning("%s ended with code %d; starting it again in %.0f s", child.name, code, delay_s)
        child.restart_at_s = time.monotonic() + delay_s
        return None

    def start_rolling_restart(self, launch: Launch) -> None:
        """Drain and restart every process with `launch`, workers first, each after the one before is ready.

        A process that does not become ready holds up the rest, which keep running; another call starts over.
        """
        self._launch = launch
        self._restarting = None
        self._to_restart = sorted(self._children, key=lambda child: child.role != "worker")
        log.info("restarting %d processes one by one", len(self._to_restart))

    @property
    def is_rolling(self) -> bool:
        """Whether a rolling restart is in progress."""
        return bool(self._to_restart) or self._restarting is not None

    def _roll(self) -> None:
        if self._restarting is not None:
            if not self._restarting.is_ready:
                return
            log.info("restarted %s", self._restarting.name)
            self._restarting = None
        if self._to_restart:
            child = self._restarting = self._to_restart.pop(0)
            child.is_ready = False
            child.restart_at_s = 0.0
            if child.process is not None and child.kill_at_s is None:
                child.close_ready()
                child.process.terminate()
                child.kill_at_s = time.monotonic() + child.grace_s + _KILL_AFTER_S

    def _start(self, child: ManagedProcess) -> None:
        child.ready_fd, ready_write = os.pipe()
        argv = [*self._command, *child.argv, "--lifeline-fd", str(self._lifeline_fd), "--ready-fd", str(ready_write)]
        fds = [self._lifeline_fd, ready_write, *child.keep_fds]
        try:
            # In a new session: Ctrl-C reaches only this process, which then stops the children in order.
            child.process = subprocess.Popen(argv, env=self._launch.environment, pass_fds=fds, start_new_session=True)
        finally:
            os.close(ready_write)
        child.started_at_s, child.grace_s, child.is_ready = time.monotonic(), self._launch.grace_s, False
        log.info("started %s as process %d", child.name, child.process.pid)

    def stop(self) -> None:
        """SIGTERM to all, and SIGKILL to what has not drained within the grace period."""
        running = [child.process for child in self._children if child.process is not None]
        for process in running:
            process.terminate()
        deadline_s = time.monotonic() + max(child.grace_s for child in self._children) + _KILL_AFTER_S
        for process in running:
            try:
                process.wait(max(0.1, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.warning("process %d did not stop within its grace period; killing it", process.pid)
                process.kill()
                process.wait()
        for child in self._children:
            child.close_ready()
