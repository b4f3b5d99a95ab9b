"""Every setting of the service in one frozen tree, read from `GIANTLEAP_*` variables and a file, and passed down.

Variables win over the file (`GIANTLEAP_SETTINGS_FILE`, TOML), options of a command over both. Only the supervisor reads
the file again, at SIGHUP, and passes the settings to its child processes as variables (`to_environment`).
"""

import ipaddress
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from giantleap.models.bundle.modes import PLAIN
from giantleap.models.bundle.names import PULLED, SHIPPED, find_bundle
from giantleap.models.engines.base import EngineName
from giantleap.models.messages import toml_fault
from giantleap.models.worker_role import WorkerRole
from giantleap.service.errors import field_errors

POCKET_BUNDLE = SHIPPED / "pocket"
PREFIX = "GIANTLEAP_"
NEEDS_RESTART = (
    "settings_file",
    "redis_url",
    "key_prefix",
    "data_dir",
    "result_store",
    "host",
    "port",
    "api_processes",
    "worker_processes",
    "role",
)
"""Settings that a reload does not change: the running supervisor holds their sockets, processes and data."""


class Settings(BaseSettings):
    """Settings of one process. A misspelled `GIANTLEAP_*` variable is an error, never ignored."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", hide_input_in_errors=True)

    settings_file: Path | None = Field(
        None, description="TOML file of settings; `serve` and `api` read it again on SIGHUP; none: variables only."
    )
    redis_url: str | None = Field(None, repr=False, description="Redis to use; none: `serve` starts an embedded one.")
    key_prefix: str = Field("giantleap", description="Prefix of every Redis key.", pattern=r"^[a-z0-9-]{1,32}$")
    data_dir: Path = Field(
        Path.home() / ".giantleap",
        description="Directory of the embedded Redis' append-only file, of results of `serve`, and of pulled bundles.",
    )
    host: str = Field("127.0.0.1", description="Address the API listens on.")
    port: int = Field(8000, description="Port the API listens on.", ge=0, le=65535)
    api_processes: int = Field(1, description="Number of API processes that `serve` and `api` start.", ge=1, le=64)
    worker_processes: int = Field(1, description="Number of worker processes that `serve` starts.", ge=1, le=64)
    role: WorkerRole = Field(
        WorkerRole.ALL,
        description="Stages that a worker runs: `all`, or for split pools `generate` or `decode` (upscale and decode); "
        "`serve` runs role `all` only.",
    )

    bundle: Annotated[tuple[Path, ...], NoDecode] = Field(
        (POCKET_BUNDLE,),
        description="Bundles to serve, by name or directory, comma-separated; the first is the default.",
    )
    model_aliases: Annotated[dict[str, str], NoDecode] = Field(
        {},
        description="Aliases of bundles, for clients with fixed model names: `dall-e-3=pocket,gpt-image-1=pocket`.",
    )
    engine: EngineName = Field(
        "torch",
        description="Engine that runs LUA: torch, torch-compile, or onnx, tensorrt, aoti on exported artifacts.",
    )
    engine_dir: Path | None = Field(
        None,
        description="Directory of `giantleap export`; several bundles: one subdirectory each, by name; "
        "none: `exports/BUNDLE-ENGINE-fp32` in the data directory.",
    )
    device: str = Field(
        "auto",
        description="cpu, cuda or cuda:N; auto: worker i of `serve` uses GPU i, or the CPU where there is no GPU.",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Data type of the pipeline; auto: float32 on a CPU; on a GPU the bundle's, else bfloat16."
    )
    bundle_memory_bytes: int | None = Field(
        None, description="Maximum bytes of bundles loaded in a worker at once; none: it loads all.", ge=1
    )
    loaded_first_s: float = Field(
        30.0, description="Time after a load in which jobs of loaded bundles go first; then the oldest job does.", ge=0
    )
    lora_dir: Path | None = Field(
        None,
        description="Directory of LoRA files (.safetensors) that requests may name, read at start; none: no LoRAs.",
    )
    lora_memory_bytes: int = Field(
        1 << 30, description="Maximum bytes of LoRA weights that a worker caches on the device.", ge=0
    )
    modes: Annotated[dict[str, str], NoDecode] = Field(
        {},
        description="Memory modes that override those of every bundle: `offload=model,quantize.transformer=bnb4` "
        "(`memory-modes.md`).",
    )
    device_memory_bytes: int | None = Field(
        None, description="Device memory that jobs may use; none: 95 % of a GPU's, 75 % of the machine's.", ge=1
    )
    torch_threads: int = Field(
        0,
        description="CPU threads of a worker or command; 0: one per processor that quota, affinity and other processes "
        "leave free at start.",
        ge=0,
    )

    queue_limit: int = Field(256, description="Maximum jobs queued and running at once; above it: 429.", ge=1)
    queue_limit_latent_px: int | None = Field(
        None,
        description="Maximum latent pixels (after upscaling) queued and running at once; above it: 429. A single job "
        "may exceed it. None: no such limit.",
        ge=1,
    )
    job_ttl_s: int = Field(3600, description="How long a finished job and its results stay readable.", ge=1)
    blob_budget_bytes: int = Field(1 << 30, description="Maximum bytes of inputs and results in Redis.", ge=1)
    result_store: str | None = Field(
        None,
        description="Store of results and large inputs: `redis`, `file:///path` or `s3://bucket/prefix`; none: "
        "`results` in the data directory if `serve` starts its own Redis, else `redis`.",
        pattern=r"^(redis|file:///[^?#]+|s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9_=-][A-Za-z0-9._=-]*)*/?)$",
    )
    result_urls: Literal["api", "presigned"] = Field(
        "api",
        description="Response to a GET of a result; `api`: its bytes; `presigned`: a redirect to a URL of S3.",
    )
    visibility_timeout_s: float = Field(
        30.0, description="Time without a heartbeat after which another worker may claim a job.", ge=0.5
    )
    step_timeout_s: float = Field(
        1800.0,
        description="Time without progress (a denoising step, a stage) after which a worker exits.",
        ge=60,  # one call of a Redis that does not answer, with its retries, takes more than half of it
    )
    max_deliveries: int = Field(3, description="Maximum starts of a job; then it is dead-lettered.", ge=1)
    retry_backoff_s: float = Field(2.0, description="Delay of the first retry; doubles with each one.", ge=0)
    idempotency_ttl_s: int = Field(86400, description="How long an Idempotency-Key is remembered.", ge=1)
    event_limit: int = Field(512, description="Maximum entries in a job's event stream.", ge=16)

    batch_items: int = Field(8, description="Maximum images in one batch.", ge=1)
    batch_budget_latent_px: int = Field(
        131_072,
        description="Maximum latent pixels (after upscaling) in one batch; a single item may exceed it.",
        ge=1,
    )
    max_image_px: int = Field(16_777_216, description="Maximum pixels of one final image.", ge=1)
    max_num_images: int = Field(4, description="Maximum images of one job.", ge=1)
    max_body_bytes: int = Field(64 << 20, description="Maximum size of a request body.", ge=1)
    api_keys_file: Path | None = Field(
        None, description="TOML file of API keys (`giantleap keys new`); none: anyone may use the service."
    )
    api_url: str | None = Field(
        None,
        description="URL of the service for `giantleap jobs`, `status` and `doctor`; none: the one on this machine.",
        pattern=r"^https?://[^?#\s]+$",
    )
    api_key: SecretStr | None = Field(
        None, description="API key that `giantleap jobs`, `status` and `doctor` send.", min_length=1
    )
    ui: bool = Field(True, description="Serve the page for browsers at `/ui`.")
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Origins whose pages may call the API, such as https://app.example.org, comma-separated."
    )
    url_secret: SecretStr | None = Field(
        None,
        description="Key that signs the URLs of results and events, which then need no API key; none: they need one.",
        min_length=16,
    )
    url_ttl_s: int = Field(3600, description="How long a signed URL is valid.", ge=1, le=7 * 86_400)
    forwarded_allow_ips: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Addresses or networks of proxies whose `X-Forwarded-Proto` and `-For` are trusted, "
        "comma-separated, or `*`; none: `FORWARDED_ALLOW_IPS`, else 127.0.0.1.",
    )
    root_path: str = Field(
        "",
        description="Path below which a proxy publishes the API, such as /giantleap; it may strip the path or not.",
        pattern=r"^(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)*$",
    )
    max_prompt_chars: int = Field(2000, description="Maximum length of a prompt.", ge=1)
    wait_timeout_s: float = Field(300.0, description="Maximum wait of a synchronous request; then 504.", gt=0)

    webhook_secret: SecretStr | None = Field(
        None, description="Key that signs webhooks; none: a request with a webhook is refused.", min_length=1
    )
    webhook_allow_private: bool = Field(
        False, description="Let webhooks go to loopback, private, link-local and other addresses that are not public."
    )
    webhook_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Hosts that webhooks may go to, comma-separated: hooks.example.org, or .example.org for all its "
        "subdomains. Their addresses are checked too.",
    )

    filters: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Image filters of installed packages (entry points 'giantleap.filters') that may refuse an image, "
        "in this order, comma-separated.",
    )
    c2pa_cert: Path | None = Field(
        None, description="PEM certificates; the first signs a C2PA manifest into every image; none: XMP alone."
    )
    c2pa_key: Path | None = Field(None, description="PEM file of that certificate's private key.")
    watermark: int | None = Field(
        None,
        description="Number to embed as a watermark in the pixels of every image; none: no watermark.",
        ge=0,
        le=65_535,
    )

    metrics_port: int = Field(0, description="Port of a worker's own /metrics; 0: none.", ge=0, le=65535)
    measure_protocol: bool = Field(
        False, description="Measure the paper's timing protocol in the worker before it is ready."
    )
    drain_grace_s: float = Field(30.0, description="Time that running work may take to end after SIGTERM.", ge=0)
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Minimum level logged.")
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="Format of log lines; auto: text if standard error is a terminal, else JSON."
    )
    otlp_endpoint: str | None = Field(
        None,
        description="Base URL of an OTLP/HTTP receiver for traces, such as http://collector:4318; none: no traces.",
        pattern=r"^https?://[^/?#\s]+$",
    )

    @field_validator("bundle", "cors_origins", "forwarded_allow_ips", "webhook_hosts", "filters", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("bundle")
    @classmethod
    def _bundles_by_name(cls, value: tuple[Path, ...], info: ValidationInfo) -> tuple[Path, ...]:
        if "data_dir" not in info.data:  # it is wrong itself
            return value
        return tuple(find_bundle(each, info.data["data_dir"] / PULLED) for each in value)

    @field_validator("model_aliases", "modes", mode="before")
    @classmethod
    def _split_pairs(cls, value: object, info: ValidationInfo) -> object:
        if not isinstance(value, str):
            return value
        pairs = [part.partition("=") for part in value.split(",") if part.strip()]
        if not all(left.strip() and right.strip() for left, _, right in pairs):
            example = "offload=model" if info.field_name == "modes" else "dall-e-3=pocket"
            raise ValueError(f"must be pairs as {example}, separated by commas")
        return {left.strip(): right.strip() for left, _, right in pairs}

    @field_validator("modes")
    @classmethod
    def _known_modes(cls, value: dict[str, str]) -> dict[str, str]:
        PLAIN.with_values(value)
        return value

    @field_validator("cors_origins")
    @classmethod
    def _plain_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(re.fullmatch(r"(?i)https?://[a-z0-9.:\[\]-]+", origin) for origin in value):
            raise ValueError("an origin must be a scheme, a host and a port, as https://app.example.org; no path, no *")
        # As browsers send it: in small letters, without the port of the scheme.
        ports = {"http": ":80", "https": ":443"}
        return tuple(each.lower().removesuffix(ports[each.lower().partition(":")[0]]) for each in value)

    @field_validator("forwarded_allow_ips")
    @classmethod
    def _addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for address in value:
            try:
                ipaddress.ip_network(address)
            except ValueError:
                if address != "*":
                    raise ValueError("a proxy must be an address or a network, as 10.0.0.0/8, or *") from None
        return value

    @field_validator("root_path", mode="before")
    @classmethod
    def _without_last_slash(cls, value: object) -> object:
        return value.rstrip("/") if isinstance(value, str) else value

    @field_validator("webhook_hosts")
    @classmethod
    def _plain_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(re.fullmatch(r"(\.?[A-Za-z0-9-]+)(\.[A-Za-z0-9-]+)*", host) for host in value):
            raise ValueError("a host must be a name, or a dot and the end of one; no scheme, no port, no *")
        return tuple(host.lower() for host in value)

    @model_validator(mode="after")
    def _bundles_given(self) -> Self:
        if not self.bundle:
            raise ValueError("bundle is empty; name at least one bundle directory")
        return self

    @model_validator(mode="after")
    def _certificate_has_key(self) -> Self:
        if (self.c2pa_cert is None) != (self.c2pa_key is None):
            raise ValueError("c2pa_cert and c2pa_key belong together; set both or none")
        return self

    @model_validator(mode="after")
    def _presigned_by_s3(self) -> Self:
        if self.result_urls == "presigned" and not (self.result_store or "").startswith("s3://"):
            raise ValueError("result_urls is presigned; set result_store to s3://bucket/prefix, or leave it at api")
        return self

    @model_validator(mode="after")
    def _protocol_is_whole(self) -> Self:
        if self.measure_protocol and self.role is not WorkerRole.ALL:
            raise ValueError("measure_protocol needs a worker of role all; leave role at its default")
        return self


def to_environment(settings: Settings) -> dict[str, str]:
    """The `GIANTLEAP_*` variables with which `read_settings` in a child process returns the same settings.

    The settings file is left out: it may have changed since the parent read it.
    """
    values = settings.model_dump(mode="json", exclude_none=True, exclude={"settings_file"})
    for name in values:  # a dump hides secrets
        if isinstance(secret := getattr(settings, name), SecretStr):
            values[name] = secret.get_secret_value()
    return {PREFIX + name.upper(): to_variable(value) for name, value in values.items()}


def to_variable(value: object) -> str:
    """A value as the text of its variable."""
    if isinstance(value, dict):
        return ",".join(f"{alias}={name}" for alias, name in value.items())
    return ",".join(value) if isinstance(value, list) else str(value)


def without_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of an environment that are not settings."""
    return {name: value for name, value in environment.items() if not name.upper().startswith(PREFIX)}


def read_settings(**overrides: object) -> Settings:
    """Read the settings: `overrides` win over the environment, which wins over the settings file.

    Raises:
        ValueError: A variable or a name in the file is unknown or has a bad value, or the file cannot be read; the
            message names it and holds no value.
    """
    variables = read_variables()
    path = overrides.get("settings_file", variables.get(PREFIX + "SETTINGS_FILE"))
    from_file = {} if path is None else read_file(Path(str(path)))
    unset = {name: value for name, value in from_file.items() if PREFIX + name.upper() not in variables}
    return Settings(**(unset | overrides))  # type: ignore[arg-type]


def read_variables() -> dict[str, str]:
    """The `GIANTLEAP_*` variables of the environment.

    Raises:
        ValueError: A variable is no setting.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    variables = {name.upper(): value for name, value in os.environ.items() if name.upper().startswith(PREFIX)}
    if unknown := sorted(variables.keys() - known):
        raise ValueError(
            f"unknown setting {', '.join(unknown)}; `giantleap settings --markdown` prints those that exist"
        )
    return variables


def read_file(path: Path) -> dict[str, object]:
    """The settings of a TOML file, not yet checked.

    Raises:
        ValueError: The file cannot be read or names what is no setting.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"settings file {path}: {error.strerror}") from None
    except ValueError as error:  # of TOML or UTF-8: the message has the place of the fault, not the text
        raise ValueError(f"settings file {path}: {toml_fault(error)}") from None
    if unknown := sorted(values.keys() - Settings.model_fields.keys() | values.keys() & {"settings_file"}):
        raise ValueError(f"settings file {path}: unknown setting {', '.join(unknown)}")
    for name, value in values.items():  # pydantic would take true for the number 1
        if isinstance(value, bool) and Settings.model_fields[name].annotation is not bool:
            raise ValueError(f"settings file {path}: {name} must not be true or false")
    return values


def format_errors(error: ValueError) -> list[str]:
    """Why settings could not be read: one line for each setting, without its value."""
    if not isinstance(error, ValidationError):
        return [str(error)]
    errors = field_errors(error.errors(include_input=False), {"body": "settings"})
    return [f"{name}: {reason}" for name, reason in errors]


def merge_reloadable(running: Settings, read: Settings) -> tuple[Settings, list[str]]:
    """The settings of processes that start after a reload, and the names of changed settings that need a restart.

    Args:
        running: Settings that the supervisor started with.
        read: Settings that it has read now.
    """
    changed = [name for name in NEEDS_RESTART if getattr(read, name) != getattr(running, name)]
    return read.model_copy(update={name: getattr(running, name) for name in NEEDS_RESTART}), changed
