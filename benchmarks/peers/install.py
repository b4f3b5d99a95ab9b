"""Install the pinned peers of `benchmarks.load`, each into its own environment below `.peers/`.

`python benchmarks/peers/install.py` takes some minutes and 0.8 GB. Each line of `pins.txt` is one environment, named
after its first package.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE.parents[1] / ".peers"


def main() -> None:
    """Create every environment."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    for line in (HERE / "pins.txt").read_text().splitlines():
        name = line.partition("==")[0].partition("[")[0]
        python = ENVIRONMENTS / name / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENTS / name)], check=True)
        print(f"{line} -> {python.parent.parent}", flush=True)
        subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", "--only-binary", ":all:", *line.split()], check=True
        )


if __name__ == "__main__":
    main()
