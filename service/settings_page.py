"""The settings as text: effective values with secrets masked, and the page of all settings."""

import re

from pydantic import SecretStr

from giantleap.service.settings import (
    NEEDS_RESTART,
    PREFIX,
    Settings,
    read_file,
    read_settings,
    read_variables,
    to_variable,
)

_MASK = "***"
_USER_IN_URL = re.compile(r"(://).*@")  # up to the last @: a password may hold one, or a slash
_PASSWORD_IN_QUERY = re.compile(r"([?&][^=&]*password=)[^&]*", re.IGNORECASE)
_PAGE_DEFAULTS = {
    "bundle": "`bundles/pocket` of the installation",
    "data_dir": "`~/.giantleap`",
    "cors_origins": "none",
    "forwarded_allow_ips": "none",
    "root_path": "none",
    "webhook_hosts": "any",
    "filters": "none",
    "model_aliases": "none",
    "modes": "none",
}


def explain_settings() -> list[tuple[str, str, str]]:
    """Variable, effective value and origin of each setting: `environment`, the settings file, or `default`.

    Secrets are masked, and so are user and password in URLs.

    Raises:
        ValueError: As `read_settings`.
    """
    settings, variables = read_settings(), read_variables()
    in_file = {} if settings.settings_file is None else read_file(settings.settings_file)
    rows = []
    for name in Settings.model_fields:
        variable = PREFIX + name.upper()
        origin = (
            "environment" if variable in variables else str(settings.settings_file) if name in in_file else "default"
        )
        rows.append((variable, _to_shown(getattr(settings, name)), origin))
    return rows


def _to_shown(value: object) -> str:
    if value is None or value in ((), "", {}):
        return "none"
    if isinstance(value, SecretStr):
        return _MASK
    text = to_variable(list(map(str, value)) if isinstance(value, tuple) else value)
    return _PASSWORD_IN_QUERY.sub(rf"\1{_MASK}", _USER_IN_URL.sub(rf"\1{_MASK}@", text))


def to_markdown() -> str:
    """Every setting as a Markdown page: variable, default, meaning. `docs/settings.md` is this text."""
    rows = []
    for name, info in Settings.model_fields.items():
        default = _PAGE_DEFAULTS.get(name, "none" if info.default is None else str(info.default))
        rows.append(f"| `{PREFIX}{name.upper()}` | {default} | {info.description} |")
    return "\n".join(
        [
            "# Settings",
            "",
            "Every setting is an environment variable; `giantleap settings` prints the effective values, and",
            "`giantleap settings --markdown` this page. A variable with this prefix and another name stops the process",
            "at start.",
            "",
            "`GIANTLEAP_SETTINGS_FILE` names a TOML file of the same settings, in small letters without the prefix:",
            "`queue_limit = 512`. What the command line or the environment says wins. SIGHUP to `giantleap serve` or",
            "`giantleap api` reads it again (`operations.md`); only a restart changes "
            + ", ".join(f"`{name}`" for name in NEEDS_RESTART[:4])
            + ",",
            ", ".join(f"`{name}`" for name in NEEDS_RESTART[4:]) + ".",
            "",
            "| variable | default | meaning |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )
