"""Checks of the API key: known, needed, and of enough scopes."""

from collections.abc import Mapping
from typing import Final

from giantleap.service.doctor.findings import Finding, fail, ok, skipped, warn
from giantleap.service.doctor.probe import Answer

NEEDED_SCOPES: Final = ("generate", "upscale", "metrics")
"""Paths and scopes that the doctor needs; each path is refused before the body is read if the key lacks it."""


def check_key(has_key: bool, without: Answer, with_key: Answer) -> Finding:
    """Whether the service asks for keys, and takes this one.

    Args:
        has_key: Whether there is a key at all.
        without: GET /models without it.
        with_key: The same with it.
    """
    if without.status == 200:
        ignored = "; the key that you gave is not checked" if has_key else ""
        return warn(
            "key",
            f"everybody who reaches the service may use it{ignored}",
            "set GIANTLEAP_API_KEYS_FILE (docs/security.md)",
        )
    if without.status != 401:
        return fail("key", f"/models: {without.explain()}", "let the proxy pass /models")
    if not has_key:
        return fail("key", "the service needs an API key, and none is given", "set GIANTLEAP_API_KEY")
    if with_key.status == 401:
        return fail("key", "the service does not know the key", "set GIANTLEAP_API_KEY; `giantleap keys new` makes one")
    if with_key.status != 200:
        return fail("key", f"/models with the key: {with_key.explain()}", "let the proxy pass Authorization")
    return ok("key", "the service needs a key and takes this one")


def check_scopes(answers: Mapping[str, Answer]) -> Finding:
    """Whether the key has the scopes that the doctor needs; `answers` are those of a path of each scope."""
    lacking = lacking_scopes(answers)
    if lacking:
        return warn("scopes", f"the key lacks {', '.join(lacking)}", "give the doctor a key of all three scopes")
    return ok("scopes", f"the key has {', '.join(answers)}")


def lacking_scopes(answers: Mapping[str, Answer]) -> tuple[str, ...]:
    """The scopes whose path was refused for the key."""
    return tuple(scope for scope, answer in answers.items() if answer.status == 403 and answer.problem_code)


def skip_for_scope(check: str, scope: str) -> Finding:
    """A check that the key does not allow."""
    return skipped(check, f"the key lacks the scope {scope}", f"set GIANTLEAP_API_KEY to a key with scope {scope}")
