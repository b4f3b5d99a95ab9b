"""The dependency audit says when it was not made; only the strict form ends in failure."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
GOOD = {"name": "fastapi", "version": "1", "vulns": []}
BAD = {"name": "pillow", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}]}
LOCAL = {"name": "torch", "version": "2+cpu", "skip_reason": "not on PyPI"}
UNKNOWN = {"name": "redis", "version": "8", "skip_reason": "not on PyPI"}


@pytest.fixture
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("answers", "strict_code", "said"),
    [
        ([[GOOD], [GOOD, LOCAL]], 0, "not audited: torch\n1 of 2 packages audited"),
        ([[GOOD], [GOOD, BAD]], 1, "VULNERABLE pillow 2: PYSEC-1, fixed in 3\n2 of 2 packages audited"),
        ([[GOOD], [GOOD, UNKNOWN]], 1, "not audited: redis\n1 of 2 packages audited"),
        ([[UNKNOWN]], 1, "audit not done: the package index gives no advisories (it does not know fastapi)"),
        ([[]], 1, "audit not done: the package index gives no advisories (it does not know fastapi)"),
    ],
)
def test_findings_are_printed_and_only_the_strict_form_fails(
    audit: ModuleType,
    answers: list[list[dict[str, Any]]],
    strict_code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for strict in (True, False):
        left = iter(answers)
        monkeypatch.setattr(audit, "run_pip_audit", lambda *options, left=left: next(left))
        assert audit.main(strict) == (strict_code if strict else 0)
        assert capsys.readouterr().out.strip() == said


@pytest.mark.parametrize(
    ("python", "time_limit_s", "said"), [("/bin/sleep", 0.05, "no report within"), ("/bin/false", 60.0, "ended with 1")]
)
def test_an_audit_without_an_answer_is_reported_as_none(
    audit: ModuleType,
    python: str,
    time_limit_s: float,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\nexec {python} 30\n")
    fake.chmod(0o755)
    monkeypatch.setattr(audit.sys, "executable", str(fake))
    monkeypatch.setattr(audit, "TIME_LIMIT_S", time_limit_s)
    assert audit.main(strict=False) == 0
    assert capsys.readouterr().out.startswith("audit not done: ") or said in capsys.readouterr().out
    assert audit.main(strict=True) == 1
    assert said in capsys.readouterr().out
