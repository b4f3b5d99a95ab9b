"""`python -m benchmarks.gpu_check decode` or `engines`: measure on a GPU and write JSON."""

from benchmarks.gpu_check.run import app

if __name__ == "__main__":
    app()
