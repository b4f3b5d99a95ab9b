"""Keeps the processes of one host running: embedded Redis, API processes and workers; stops them all together.

SIGHUP reads the settings again (`reload`) and drains and restarts the processes one by one
(`ProcessManager.start_rolling_restart`); each reads bundles and artifacts from disk again. The supervisor holds the
listening socket, so that connections wait while a single API process restarts.

Children are separate Python processes that run `giantleap api` and `giantleap worker`. Each holds the read end of a
pipe whose write end only this process has: when this process ends, however it ends, the pipe closes and the child
stops itself (`exit_with_parent`), so that nothing is orphaned even after kill -9.
"""

import contextlib
import logging
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from giantleap.models.worker_role import WorkerRole
from giantleap.service.errors import BadConfiguration
from giantleap.service.settings import Settings, format_errors, merge_reloadable, to_environment, without_settings
from giantleap.service.supervisor.embedded_redis import EmbeddedRedis
from giantleap.service.supervisor.processes import Launch, ManagedProcess, ProcessManager

log = logging.getLogger(__name__)

RESULTS = "results"
"""Directory of results in the data directory of `serve` with an embedded Redis."""
_POLL_S = 0.2


def serve(settings: Settings, reread: Callable[[], Settings]) -> int:
    """Run Redis (unless a URL is given), API and workers until SIGINT or SIGTERM; return the exit code.

    Args:
        settings: The settings at start.
        reread: Reads them again on SIGHUP; raises ValueError or BadConfiguration.

    Raises:
        BadConfiguration: the role of the workers is not `all`.
        OSError: the port is taken.
        NotReady: the embedded Redis did not start, or not again.
    """
    if settings.role is not WorkerRole.ALL:
        raise BadConfiguration(
            f"role: `serve` runs workers of role all, not {settings.role}; run `giantleap api`, and "
            "`giantleap worker --role` for each pool"
        )
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(open_listener(settings.host, settings.port))
        workers = [_worker(number) for number in range(settings.worker_processes)]
        children = [*_api_children(settings, listener), *workers]
        if settings.redis_url is not None:
            return _supervise(settings, reread, settings.redis_url, children, None, stack)
        redis = EmbeddedRedis()
        stack.callback(redis.stop)
        return _supervise(settings, reread, redis.start(settings.data_dir), children, redis, stack)


def serve_api(settings: Settings, reread: Callable[[], Settings]) -> int:
    """Run only the API processes of this host until SIGINT or SIGTERM; return the exit code.

    `settings.redis_url` must be set.
    """
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(open_listener(settings.host, settings.port))
        children = _api_children(settings, listener)
        return _supervise(settings, reread, settings.redis_url or "", children, None, stack)


def _api_children(settings: Settings, listener: socket.socket) -> list[ManagedProcess]:
    fd = listener.fileno()
    return [
        ManagedProcess(f"api-{number}", ("api", "--listen-fd", str(fd)), keep_fds=(fd,))
        for number in range(settings.api_processes)
    ]


def _worker(number: int) -> ManagedProcess:
    return ManagedProcess(f"worker-{number}", ("worker", "--number", str(number)))


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
    settings: Settings,
    reread: Callable[[], Settings],
    redis_url: str,
    children: Sequence[ManagedProcess],
    redis: EmbeddedRedis | None,
    stack: contextlib.ExitStack,
) -> int:
    stop, hung_up = threading.Event(), threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        previous = signal.signal(number, lambda *_: stop.set())
        stack.callback(signal.signal, number, previous)
    lifeline_read, lifeline_write = os.pipe()
    stack.callback(os.close, lifeline_write)
    stack.callback(os.close, lifeline_read)
    metrics_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="giantleap-metrics-"))

    def to_launch(chosen: Settings) -> Launch:
        own = to_environment(to_child_settings(chosen, redis_url, is_embedded=redis is not None))
        shared = {"PROMETHEUS_MULTIPROC_DIR": metrics_dir}
        return Launch(without_settings(os.environ) | own | shared, chosen.drain_grace_s)

    manager = ProcessManager(children, to_launch(settings), lifeline_read, Path(metrics_dir))
    stack.callback(manager.stop)
    on_terminal = os.isatty(0)

    def hang_up(*_: object) -> None:
        if on_terminal and not os.isatty(0):  # the terminal was closed: not a request to reload
            stop.set()
        else:
            hung_up.set()

    previous = signal.signal(signal.SIGHUP, hang_up)
    stack.callback(signal.signal, signal.SIGHUP, previous)

    while not stop.is_set():
        if redis is not None and not redis.is_alive():
            log.warning("the embedded Redis ended by itself; starting it again at the same address")
            redis.start(settings.data_dir, urlsplit(redis_url).port or 0)
        code = manager.poll()
        if code is not None:
            return code
        if hung_up.is_set():
            hung_up.clear()
            if (chosen := reload(settings, reread)) is not None:
                manager.start_rolling_restart(to_launch(chosen))
        stop.wait(_POLL_S)
    return 0


def to_child_settings(settings: Settings, redis_url: str, is_embedded: bool) -> Settings:
    """The settings of the child processes: with an embedded Redis, which is of this host alone, results are files."""
    store = settings.result_store
    if store is None and is_embedded:
        store = (settings.data_dir.resolve() / RESULTS).as_uri()
    return settings.model_copy(update={"redis_url": redis_url, "result_store": store})


def reload(settings: Settings, reread: Callable[[], Settings]) -> Settings | None:
    """Read the settings again; None, and a line in the log, where they are wrong.

    Settings that need a restart of the supervisor stay as they are and are named in the log.

    Args:
        settings: The settings at start.
        reread: Reads them again.
    """
    try:
        read = reread()
    except ValueError as error:
        log.error("settings not reloaded, the old ones stay: %s", "; ".join(format_errors(error)))
        return None
    except BadConfiguration as error:
        log.error("settings not reloaded, the old ones stay: %s", error.detail)
        return None
    chosen, fixed = merge_reloadable(settings, read)
    if fixed:
        log.warning("changed, but only a restart applies it: %s", ", ".join(fixed))
    return chosen


def notify_ready(ready_fd: int | None) -> None:
    """Report to the supervisor, if there is one, that this process is ready, and close the pipe."""
    if ready_fd is not None:
        os.write(ready_fd, b"1")
        os.close(ready_fd)


def exit_with_parent(lifeline_fd: int, grace_s: float) -> None:
    """Watch the pipe to the supervisor from a daemon thread; when it closes, end this process.

    The thread sends SIGTERM to this process when the supervisor is gone, and calls `os._exit(1)` after `grace_s` more
    seconds.
    """

    def watch() -> None:
        while os.read(lifeline_fd, 1):  # the supervisor never writes: a return means end of file
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_s)
        os._exit(1)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
