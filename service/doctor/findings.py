"""A finding: one line of the doctor's report."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

HIDDEN: Final = "***"


class Level(StrEnum):
    """How bad it is; `skipped` was not checked, which is never ok."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check saw.

    Args:
        level: How bad it is.
        check: Name of the check.
        found: What it saw; of a skipped check why.
        advice: What to do; of a skipped check what would enable it. Empty where all is well.
    """

    level: Level
    check: str
    found: str
    advice: str = ""

    def to_line(self) -> str:
        """The finding as one line of text."""
        advice = f"  -> {self.advice}" if self.advice else ""
        return " ".join(f"{self.level:<7}  {self.check:<10}  {self.found}{advice}".splitlines())

    def without(self, secrets: Collection[str]) -> "Finding":
        """The finding with each secret masked: another server at the address may echo the request."""
        found, advice = self.found, self.advice
        for secret in secrets:
            found, advice = found.replace(secret, HIDDEN), advice.replace(secret, HIDDEN)
        return replace(self, found=found, advice=advice)


def ok(check: str, found: str) -> Finding:
    """All is well."""
    return Finding(Level.OK, check, found)


def warn(check: str, found: str, advice: str) -> Finding:
    """It works, and may not always."""
    return Finding(Level.WARN, check, found, advice)


def fail(check: str, found: str, advice: str) -> Finding:
    """It does not work, or jobs can be lost."""
    return Finding(Level.FAIL, check, found, advice)


def skipped(check: str, reason: str, enable: str) -> Finding:
    """It was not checked."""
    return Finding(Level.SKIPPED, check, reason, enable)


def is_healthy(findings: Iterable[Finding]) -> bool:
    """Whether nothing failed."""
    return all(finding.level is not Level.FAIL for finding in findings)
