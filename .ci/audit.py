"""Checks the installed packages for known vulnerabilities with pip-audit, and reports when the check was impossible.

`python .ci/audit.py` reports and exits with 0: a missing network or a new advisory must not stop unrelated work.
`--strict` (`make audit`) exits with 1 unless every package was checked and none is vulnerable. A package index that
only mirrors files has no advisories; pip-audit then calls every package unknown and exits with 0, so one well-known
package is checked first.
"""

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

TIME_LIMIT_S = 50.0
PROBE = "fastapi"
# Built locally, or of a local version (torch 2.13.0+cpu): PyPI has no advisories for that name and version.
EXPECTED_SKIPS = frozenset({"giantleap", "torch"})


class NotDone(Exception):
    """The audit was impossible; the message says why."""


def run_pip_audit(*options: str) -> list[dict[str, Any]]:
    """pip-audit's entry for each dependency: its vulnerabilities (`vulns`) or why it was skipped (`skip_reason`).

    Raises:
        NotDone: pip-audit is not installed, took too long, or printed no report.
    """
    command = [sys.executable, "-m", "pip_audit", "--progress-spinner", "off", "--timeout", "10", "-f", "json"]
    try:
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=TIME_LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise NotDone(f"no report within {TIME_LIMIT_S:.0f} s") from error
    try:
        found: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError) as error:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise NotDone(f"pip-audit ended with {done.returncode}: {lines[-1][:200]}") from error
    return found


def audit() -> list[dict[str, Any]]:
    """pip-audit's entries for all installed packages.

    Raises:
        NotDone: the index gives no advisories, or as `run_pip_audit`.
    """
    with tempfile.TemporaryDirectory() as folder:
        one = Path(folder) / "requirements.txt"
        one.write_text(f"{PROBE}=={version(PROBE)}\n")
        probed = run_pip_audit("--no-deps", "--disable-pip", "-r", str(one))
    if not probed or "skip_reason" in probed[0]:
        raise NotDone(f"the package index gives no advisories (it does not know {PROBE})")
    return run_pip_audit("--skip-editable")


def report(found: list[dict[str, Any]]) -> tuple[list[str], bool]:
    """The lines to print, and whether every package was checked and none is vulnerable."""
    lines = [
        f"VULNERABLE {item['name']} {item['version']}: {flaw['id']}, fixed in {', '.join(flaw['fix_versions']) or '-'}"
        for item in found
        for flaw in item.get("vulns", ())
    ]
    clean = not lines
    skipped = sorted(item["name"] for item in found if "skip_reason" in item)
    if skipped:
        lines.append(f"not audited: {', '.join(skipped)}")
    lines.append(f"{len(found) - len(skipped)} of {len(found)} packages audited")
    return lines, clean and set(skipped) <= EXPECTED_SKIPS


def main(strict: bool) -> int:
    """Print the report and return the exit code."""
    try:
        lines, good = report(audit())
    except NotDone as reason:
        lines, good = [f"audit not done: {reason}"], False
    print("\n".join(lines))
    return 1 if strict and not good else 0


if __name__ == "__main__":
    sys.exit(main(strict="--strict" in sys.argv[1:]))
