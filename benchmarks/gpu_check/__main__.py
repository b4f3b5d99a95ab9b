"""`python -m benchmarks.gpu_check`: the measurements that need a GPU (`benchmarks/gpu_check/run.py`)."""

from benchmarks.gpu_check.run import app

if __name__ == "__main__":
    app()
