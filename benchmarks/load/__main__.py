"""`python -m benchmarks.load`: the service under load (`benchmarks/load/run.py`)."""

from benchmarks.load.run import main

if __name__ == "__main__":
    main()
