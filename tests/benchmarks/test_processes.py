"""A benchmark leaves no process behind, whatever the server that it measured started."""

import sys
from pathlib import Path

import psutil
import pytest

from benchmarks.processes import run_process
from tests.waiting import wait_until

# A server as LitServe and Ray are: it ends at SIGTERM and leaves its children to init; one of them has a session of its
# own, and none heeds SIGTERM.
SERVER = """
import subprocess, sys, time
child = "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
child += "open(sys.argv[1], 'w').write('up'); time.sleep(600)"
started = [
    subprocess.Popen([sys.executable, "-c", child, f"{sys.argv[1]}/{n}"], start_new_session=n == 2) for n in range(3)
]
time.sleep(600)
"""


def test_every_process_of_a_server_ends_with_it(tmp_path: Path) -> None:
    with run_process([sys.executable, "-c", SERVER, str(tmp_path)], stop_timeout_s=5.0) as process:
        wait_until(lambda: len(list(tmp_path.iterdir())) == 3)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) == 3
    assert [child for child in children if child.is_running()] == []


def test_what_a_block_raises_is_passed_on_after_the_end() -> None:
    with (
        pytest.raises(KeyError),
        run_process([sys.executable, "-c", "import time; time.sleep(600)"]) as process,
    ):
        raise KeyError
    assert process.returncode == -15
