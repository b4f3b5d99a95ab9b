"""Keeps the processes of one host alive: embedded Redis, API processes and workers; stops them all together.

Children are separate Python processes that run `giantleap api` and `giantleap worker`. Each holds the read end of a
pipe whose write end only this process has: when this process ends, however it ends, the pipe closes and
the child stops itself (`stop_with_parent`), so that nothing is orphaned even after kill -9.
"""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from service.cli_options import BAD_CONFIGURATION
from service.embedded_redis import EmbeddedRedis
from service.settings import Settings, to_environment

log = logging.getLogger(__name__)

_POLL_S = 0.2
_HEALTHY_AFTER_S = 30.0
_MOST_CRASHES = 5


@dataclass(slots=True)
class Child:
    """One supervised process: what it runs, and how often it has crashed since it last stayed up."""

    name: str
    argv: tuple[str, ...]
    keep_fds: tuple[int, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    started_at_s: float = 0.0
    crashes: int = 0
    restart_at_s: float = field(default=0.0)


def plan_restart(crashes: int, ran_s: float) -> tuple[int, float]:
    """Crash count and delay in seconds after a child ended by itself: 1, 2, 4, 8, ... s, reset by a healthy run."""
    crashes = 1 if ran_s >= _HEALTHY_AFTER_S else crashes + 1
    return crashes, float(min(2 ** (crashes - 1), 30))


def serve(settings: Settings) -> int:
    """Run Redis (unless a URL is given), API and workers until SIGINT or SIGTERM; the exit code.

    Raises:
        OSError: the port is taken.
        NotReady: the embedded Redis did not start, or not again.
    """
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(open_listener(settings.host, settings.port))
        redis = None
        if settings.redis_url is None:
            redis = EmbeddedRedis()
            stack.callback(redis.stop)
            settings = settings.model_copy(update={"redis_url": redis.start(settings.data_dir)})
        workers = [_worker(number) for number in range(settings.worker_processes)]
        children = [*_api_children(settings, listener), *workers]
        return _supervise(settings, children, redis, stack)


def serve_api(settings: Settings) -> int:
    """Run only the API processes of this host until SIGINT or SIGTERM; the exit code."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(open_listener(settings.host, settings.port))
        return _supervise(settings, _api_children(settings, listener), None, stack)


def _api_children(settings: Settings, listener: socket.socket) -> list[Child]:
    fd = listener.fileno()
    return [
        Child(f"api-{number}", ("api", "--listen-fd", str(fd)), keep_fds=(fd,))
        for number in range(settings.api_processes)
    ]


def _worker(number: int) -> Child:
    return Child(f"worker-{number}", ("worker",))


@contextlib.contextmanager
def open_listener(host: str, port: int) -> Iterator[socket.socket]:
    """A listening TCP socket that several API processes share."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
        listener.set_inheritable(True)
        yield listener


def _supervise(
    settings: Settings, children: Sequence[Child], redis: EmbeddedRedis | None, stack: contextlib.ExitStack
) -> int:
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        previous = signal.signal(number, lambda *_: stop.set())
        stack.callback(signal.signal, number, previous)
    lifeline_read, lifeline_write = os.pipe()
    stack.callback(os.close, lifeline_write)
    stack.callback(os.close, lifeline_read)
    metrics_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="giantleap-metrics-"))
    environment = {**os.environ, **to_environment(settings), "PROMETHEUS_MULTIPROC_DIR": metrics_dir}
    stack.callback(_stop_all, children, settings.drain_grace_s)

    while not stop.is_set():
        if redis is not None and not redis.is_alive():
            log.warning("the embedded Redis ended by itself; starting it again at the same address")
            redis.start(settings.data_dir, urlsplit(settings.redis_url or "").port or 0)
        for child in children:
            if child.process is None and time.monotonic() >= child.restart_at_s:
                _start(child, environment, lifeline_read)
            elif child.process is not None and (code := child.process.poll()) is not None:
                child.process = None
                if code == BAD_CONFIGURATION:
                    log.error("%s cannot start: its configuration is wrong (see above)", child.name)
                    return BAD_CONFIGURATION
                child.crashes, delay_s = plan_restart(child.crashes, time.monotonic() - child.started_at_s)
                if child.crashes > _MOST_CRASHES:
                    log.error(
                        "%s ended %d times in a row, last with code %d: giving up", child.name, child.crashes, code
                    )
                    return 1
                log.warning("%s ended with code %d; starting it again in %.0f s", child.name, code, delay_s)
                child.restart_at_s = time.monotonic() + delay_s
        stop.wait(_POLL_S)
    return 0


def _start(child: Child, environment: dict[str, str], lifeline_fd: int) -> None:
    argv = [sys.executable, "-m", "service.cli", *child.argv, "--lifeline-fd", str(lifeline_fd)]
    child.started_at_s = time.monotonic()
    # A session of its own: Ctrl-C reaches only this process, which then stops the children in order.
    child.process = subprocess.Popen(
        argv, env=environment, pass_fds=(lifeline_fd, *child.keep_fds), start_new_session=True
    )
    log.info("started %s as process %d", child.name, child.process.pid)


def _stop_all(children: Sequence[Child], grace_s: float) -> None:
    running = [child.process for child in children if child.process is not None]
    for process in running:
        process.terminate()
    deadline_s = time.monotonic() + grace_s + 5.0
    for process in running:
        try:
            process.wait(max(0.1, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.warning("process %d did not stop within its grace period; killing it", process.pid)
            process.kill()
            process.wait()


def stop_with_parent(lifeline_fd: int, grace_s: float) -> None:
    """Watch the pipe to the supervisor from a daemon thread; when it closes, end this process, at the latest by force.

    Effects: SIGTERM to this process when the supervisor is gone; `os._exit(1)` after `grace_s` more seconds.
    """

    def watch() -> None:
        while os.read(lifeline_fd, 1):  # the supervisor never writes: a return means end of file
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_s)
        os._exit(1)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
