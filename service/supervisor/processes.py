"""The processes of one host as the supervisor runs them: started, started again when they end, replaced one by one.

Nothing here waits: `giantleap.service.supervisor.supervisor` calls `ProcessManager.keep` and `ProcessManager.roll`
again and again. What only the supervisor knows, restarts and reloads, is written to a file that `/metrics` reads
(`giantleap.service.telemetry.metrics.HostCollector`).
"""

import logging
import os
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from giantleap.service.errors import EXIT_BAD_CONFIGURATION, EXIT_HUNG
from giantleap.service.telemetry.metrics import HostState, write_host_state

log = logging.getLogger(__name__)

_HEALTHY_AFTER_S = 30.0
_MAX_CRASHES = 5
_KILL_AFTER_S = 5.0


@dataclass(slots=True)
class ManagedProcess:
    """One supervised process: what it runs, how often it has crashed since it last stayed up, whether it ever worked.

    `ready_fd` is the pipe on which the process that runs will say that it works.
    """

    name: str
    argv: tuple[str, ...]
    keep_fds: tuple[int, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    started_at_s: float = 0.0
    crashes: int = 0
    restart_at_s: float = field(default=0.0)
    ready_fd: int | None = None
    has_worked: bool = False

    @property
    def role(self) -> str:
        return self.argv[0]

    def read_ready(self) -> None:
        """Takes in what the process said on its pipe, if anything."""
        if self.ready_fd is not None and select.select([self.ready_fd], [], [], 0)[0]:
            self.has_worked |= bool(os.read(self.ready_fd, 1))
            self.close_ready()

    def close_ready(self) -> None:
        if self.ready_fd is not None:
            os.close(self.ready_fd)
        self.ready_fd = None


@dataclass(slots=True)
class Replacement:
    """A process that will take a child's place once it says on its pipe that it is ready."""

    process: subprocess.Popen[bytes]
    started_at_s: float
    ready_fd: int


@dataclass(frozen=True, slots=True)
class Launch:
    """With what processes are started, and how long they may drain."""

    environment: Mapping[str, str]
    grace_s: float


def plan_restart(crashes: int, ran_s: float) -> tuple[int, float]:
    """Crash count and delay in seconds after a child ended by itself: 1, 2, 4, 8, ... s, reset by a healthy run."""
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
        children: What shall run; workers and API processes.
        launch: With what they are started.
        lifeline_fd: The read end of the pipe that tells them of our end.
        shared_dir: Where restarts and reloads are written for whoever answers `/metrics`.
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
        self._next: Launch | None = None
        self._lifeline_fd = lifeline_fd
        self._shared_dir = shared_dir
        self._command = command
        self._restarts: dict[str, Counter[str]] = {"api": Counter(), "worker": Counter()}
        self._reload_successful = True
        self._reloaded_at_s = 0.0
        self._to_replace: list[ManagedProcess] = []
        self._replaced: list[ManagedProcess] = []
        self._successor: Replacement | None = None
        self._retiring: list[tuple[subprocess.Popen[bytes], float]] = []

    def keep(self) -> int | None:
        """Start what does not run and is due; the exit code of the whole where something cannot be started."""
        for child in self._children:
            if child.process is None and time.monotonic() >= child.restart_at_s:
                child.started_at_s = time.monotonic()
                launch = self._next if child in self._replaced else None
                child.process, child.ready_fd = self._start(child, launch or self._launch)
            elif child.process is not None:
                code = child.process.poll()
                child.read_ready()  # after the poll: what has ended said all that it will
                if code is None:
                    continue
                child.process = None
                child.close_ready()
                if (given_up := self._plan_restart(child, code)) is not None:
                    return given_up
        return None

    def _plan_restart(self, child: ManagedProcess, code: int) -> int | None:
        if code == EXIT_BAD_CONFIGURATION:
            log.error("%s cannot start: its configuration is wrong (see above)", child.name)
            return EXIT_BAD_CONFIGURATION
        self._restarts[child.role][to_reason(code)] += 1
        self._write_state()
        child.crashes, delay_s = plan_restart(child.crashes, time.monotonic() - child.started_at_s)
        if child.crashes > _MAX_CRASHES and not child.has_worked:
            log.error("%s ended %d times in a row, last with code %d: giving up", child.name, child.crashes, code)
            return 1
        log.warning("%s ended with code %d; starting it again in %.0f s", child.name, code, delay_s)
        child.restart_at_s = time.monotonic() + delay_s
        return None

    def note_reload(self, successful: bool) -> None:
        """What became of the last configuration that was asked for. Effects: `/metrics` of this host tells it."""
        self._reload_successful = successful
        if successful:
            self._reloaded_at_s = time.time()
        self._write_state()

    def _write_state(self) -> None:
        restarts = {role: dict(counts) for role, counts in self._restarts.items()}
        state = HostState(restarts, self._reload_successful, self._reloaded_at_s)
        write_host_state(self._shared_dir, state)

    def ask_roll(self, launch: Launch) -> None:
        """Every process shall be replaced by one that is started with `launch`, workers first; not while rolling."""
        self._next = launch
        self._replaced = []
        self._to_replace = sorted(self._children, key=lambda child: child.role != "worker")
        log.info("replacing %d processes one by one", len(self._to_replace))

    @property
    def is_rolling(self) -> bool:
        return bool(self._to_replace) or bool(self._retiring)

    def roll(self) -> None:
        """The next step of a replacement: start a successor, hand over once it is ready, end what drained too long.

        A successor that ends before it is ready ends the replacement: what runs goes on, and what was replaced
        already is replaced again with the settings from before. One that ends by itself meanwhile is started again
        with the settings that it had, for they are known to work.
        """
        for process, deadline_s in list(self._retiring):
            if process.poll() is not None:
                self._retiring.remove((process, deadline_s))
            elif time.monotonic() >= deadline_s:
                process.kill()
        if not self._to_replace:
            return
        child, successor = self._to_replace[0], self._successor
        if successor is None:
            self._successor = self._start_successor(child)
        elif successor.process.poll() is not None:
            log.error("the new %s ended before it was ready; nothing more is replaced", child.name)
            self._drop_successor()
            self._give_up_roll()
        elif select.select([successor.ready_fd], [], [], 0)[0] and os.read(successor.ready_fd, 1):
            self._transfer(child, successor)

    def _transfer(self, child: ManagedProcess, successor: Replacement) -> None:
        if child.process is not None:
            child.process.terminate()
            grace_s = self._launch.grace_s if self._next is None else max(self._launch.grace_s, self._next.grace_s)
            self._retiring.append((child.process, time.monotonic() + grace_s + _KILL_AFTER_S))
        child.close_ready()
        child.process, child.started_at_s, child.crashes = successor.process, successor.started_at_s, 0
        child.has_worked = True
        self._drop_successor()
        self._to_replace.remove(child)
        self._replaced.append(child)
        log.info("replaced %s by process %d", child.name, child.process.pid)
        if not self._to_replace and self._next is not None:
            self._launch, self._next = self._next, None
            self.note_reload(True)

    def _give_up_roll(self) -> None:
        back = self._next is not None and self._next.environment != self._launch.environment
        self._to_replace = self._replaced if back else []
        self._next, self._replaced = None, []
        if self._to_replace:
            log.info("going back to the settings from before for %d processes", len(self._to_replace))
        self.note_reload(False)

    def _start_successor(self, child: ManagedProcess) -> Replacement:
        process, ready_fd = self._start(child, self._next or self._launch)
        return Replacement(process, time.monotonic(), ready_fd)

    def _drop_successor(self) -> None:
        if self._successor is not None:
            os.close(self._successor.ready_fd)
        self._successor = None

    def _start(self, child: ManagedProcess, launch: Launch) -> tuple[subprocess.Popen[bytes], int]:
        """The process, and the pipe on which it will say that it works."""
        ready_read, ready_write = os.pipe()
        try:
            argv = [
                *self._command,
                *child.argv,
                "--lifeline-fd",
                str(self._lifeline_fd),
                "--ready-fd",
                str(ready_write),
            ]
            fds = [self._lifeline_fd, ready_write, *child.keep_fds]
            # A session of its own: Ctrl-C reaches only this process, which then stops the children in order.
            process = subprocess.Popen(argv, env=launch.environment, pass_fds=fds, start_new_session=True)
        finally:
            os.close(ready_write)
        log.info("started %s as process %d", child.name, process.pid)
        return process, ready_read

    def stop(self) -> None:
        """SIGTERM to all, and SIGKILL to what has not drained within the grace period."""
        running = [child.process for child in self._children if child.process is not None]
        running += [process for process, _ in self._retiring]
        if self._successor is not None:
            running.append(self._successor.process)
            self._drop_successor()
        for process in running:
            process.terminate()
        grace_s = max(launch.grace_s for launch in (self._launch, self._next) if launch is not None)
        deadline_s = time.monotonic() + grace_s + _KILL_AFTER_S
        for process in running:
            try:
                process.wait(max(0.1, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.warning("process %d did not stop within its grace period; killing it", process.pid)
                process.kill()
                process.wait()
        for child in self._children:
            child.close_ready()
