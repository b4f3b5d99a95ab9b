"""Install Ray Data, and an S3 for tests, on top of this environment into one of its own below `.peers/`.

`python benchmarks/batch/install.py` takes minutes. The new environment sees the packages of this one, with torch.
"""

import argparse
import subprocess
import sys
import sysconfig
from pathlib import Path

ENVIRONMENT = Path(__file__).resolve().parents[2] / ".peers" / "ray-data"
PACKAGES = ("ray[data]==2.60.0", "s3fs>=2025.3,<2028", "moto[server]>=5.1,<6")


def main() -> None:
    """Create the environment."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        (packages,) = ENVIRONMENT.glob("lib/python*/site-packages")
        (packages / "below.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--only-binary", ":all:", *PACKAGES], check=True)


if __name__ == "__main__":
    main()
