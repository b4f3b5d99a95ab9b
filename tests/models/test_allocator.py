"""Memory that a process freed is there for the next buffer, without the page faults of a new mapping."""

import subprocess
import sys

BUFFERS, PAGES = 200, 1024
# Two buffers live at once, as those of a request do; without the setting the top of the heap is given back each time.
CODE = f"""
import resource, sys
from giantleap.models.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range({BUFFERS}):
    first, second = bytearray({PAGES} * 4096), bytearray({PAGES} * 4096)
    del first, second
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def faults(what: str) -> int:
    ran = subprocess.run([sys.executable, "-c", CODE, what], capture_output=True, text=True, check=True)
    return int(ran.stdout)


def test_a_freed_buffer_is_used_again() -> None:
    assert faults("keep") + BUFFERS * PAGES // 2 < faults("leave")
