"""`python -m benchmarks.load`: measure the service under load, write the JSON and docs/load.md."""

from benchmarks.load.run import main

if __name__ == "__main__":
    main()
