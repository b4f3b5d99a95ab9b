"""The help of a benchmark comes at once: torch is loaded to measure."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("name", ["benchmarks.batching", "benchmarks.engines"])
def test_the_help_does_not_load_torch(name: str) -> None:
    program = f"import sys, {name}.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
