"""The settings of the service: one class, read from the environment, with safe defaults.

Each field is the variable ``FINETUNING_<FIELD>`` (or the names it lists); an unknown ``FINETUNING_*``
variable is an error, since a misspelt setting that is silently ignored is worse than a refused start.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AliasChoices,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from comps.cores.errors import StartupError

PREFIX = "FINETUNING_"

# What Kubernetes sets in every container of a namespace with a Service named "finetuning"; it also sets
# FINETUNING_PORT, to a URL.
_KUBERNETES = re.compile(rf"{PREFIX}(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_[A-Z]+)?)")
_KUBERNETES_URLS = ("tcp://", "udp://", "sctp://")

# A comma-separated variable.
Listed = Annotated[tuple[str, ...], NoDecode]
Secrets = Annotated[tuple[SecretStr, ...], NoDecode]


def is_loopback(host: str) -> bool:
    """Whether a server bound to ``host`` can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _keys_in(path: Path) -> tuple[SecretStr, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the file {path} cannot be read: {error}") from error
    return tuple(SecretStr(line.strip()) for line in lines if line.strip())


class Settings(BaseSettings):
    """See the module. Paths are absolute after validation; times are seconds, sizes bytes."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True,
        validate_by_name=True, validate_by_alias=True, hide_input_in_errors=True,
    )  # fmt: skip

    host: str = Field("127.0.0.1", description="Address to listen on; anything but loopback needs API keys.")
    port: int = Field(8015, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    data_dir: Path = Field(Path("data"), validate_default=True, description="Database, files, jobs.")
    models_dir: Path = Field(
        default_factory=lambda known: known.get("data_dir", Path()) / "models",
        description="Base models, each in a directory `org/name`; by default `models` in the data directory.",
    )
    tasks_dir: Path = Field(
        default_factory=lambda known: known.get("data_dir", Path()) / "tasks",
        description="Evaluation tasks, each `<name>/test.json`; by default `tasks` in the data directory.",
    )
    database_url: str = Field(
        default_factory=lambda known: f"sqlite:///{known.get('data_dir', Path()) / 'finetuning.db'}",
        description="SQLAlchemy URL of the SQLite database; by default in the data directory.",
    )
    api_keys_file: Path | None = Field(None, description="File with API keys, one on a line.")
    api_keys: Secrets = Field(
        (),
        validate_default=True,
        validation_alias=AliasChoices("FINETUNING_API_KEYS", "OPEA_API_KEYS"),
        description="Keys that clients send as `Authorization: Bearer KEY`, comma-separated.",
    )
    operator_keys: Secrets = Field(
        (), description="Keys that see and may change everything of everyone, comma-separated."
    )
    allow_unauthenticated: bool = Field(
        False, description="Listen on any address without keys, for a container behind a gateway."
    )
    allowed_hosts: Listed = Field(
        (),
        description="Further Host (and Origin) names to answer to, comma-separated: a proxy's, or without "
        "keys the container's.",
    )
    trust_remote_code_models: Listed = Field(
        (), description="Base models whose own code may run, comma-separated names; of no other it does."
    )
    max_upload_bytes: int = Field(
        512 * 2**20, ge=1, description="Largest uploaded file, in bytes, in one piece or in parts."
    )
    max_body_bytes: int = Field(2**20, ge=1, description="Largest JSON body, in bytes.")
    head_seconds: float = Field(
        20,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that a connection may wait for a request, to the end of its headers.",
    )
    body_seconds: float = Field(60, gt=0, description="Seconds that a JSON body may take to arrive.")
    max_concurrent_uploads: int = Field(
        16, ge=1, description="Files and parts received at a time; a further one gets 503."
    )
    upload_idle_seconds: float = Field(
        60, gt=0, allow_inf_nan=False, description="Seconds without a byte after which an upload is given up."
    )
    max_record_bytes: int = Field(10_000_000, ge=1, description="Largest record of a data file, in bytes.")
    max_records: int = Field(1_000_000, ge=1, description="Most records in a data file.")
    max_queued_jobs: int = Field(
        1000,
        ge=1,
        description="Jobs not ended, running ones, extractions and merges too; a further one gets 429.",
    )
    stop_seconds: float = Field(
        10,
        ge=0,
        allow_inf_nan=False,
        description="Seconds that running jobs have to save when the service stops.",
    )
    max_attempts: int = Field(
        3, ge=1, description="Deaths in a row, without a new checkpoint, after which a job fails."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level logged.")
    ray_address: str = Field(
        "", validation_alias="RAY_ADDRESS", description="Ray cluster to join; absent: a local one is started."
    )
    hf_token: SecretStr | None = Field(
        None, validation_alias="HF_TOKEN", description="Hugging Face token for gated base models."
    )
    hf_hub_offline: bool = Field(
        False, validation_alias="HF_HUB_OFFLINE", description="Never ask the Hugging Face hub for a model."
    )

    @field_validator("port", mode="before")
    @classmethod
    def _not_of_kubernetes(cls, value: object) -> object:
        if isinstance(value, str) and value.startswith(_KUBERNETES_URLS):
            return cls.model_fields["port"].default
        return value

    @field_validator("data_dir", "models_dir", "tasks_dir", "api_keys_file")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        return path.expanduser().resolve() if path else None

    @field_validator("api_keys_file")
    @classmethod
    def _has_keys(cls, path: Path | None) -> Path | None:
        if path and not _keys_in(path):
            raise ValueError(f"the file {path} holds no key")
        return path

    @field_validator("allowed_hosts", "api_keys", "operator_keys", "trust_remote_code_models", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("api_keys")
    @classmethod
    def _with_file(cls, keys: tuple[SecretStr, ...], info: ValidationInfo) -> tuple[SecretStr, ...]:
        path = info.data.get("api_keys_file")
        return keys + _keys_in(path) if path else keys

    @model_validator(mode="after")
    def _closed_to_strangers(self) -> Settings:
        keys = self.api_keys or self.operator_keys
        if keys or self.allow_unauthenticated or is_loopback(self.host):
            return self
        raise ValueError(
            f"without API keys the service listens on this machine only, not on {self.host}: set "
            "FINETUNING_API_KEYS, or FINETUNING_ALLOW_UNAUTHENTICATED=1 behind a gateway that asks for keys"
        )

    @property
    def files_dir(self) -> Path:
        """Bytes of uploaded and produced files, named by file id."""
        return self.data_dir / "files"

    @property
    def jobs_dir(self) -> Path:
        """One directory a job, named by job id (see ``comps.tuning.rundir``)."""
        return self.data_dir / "jobs"

    @property
    def ray_dir(self) -> Path:
        """What a locally started Ray leaves: its token, its process ids, its logs."""
        return self.data_dir / "ray"


def variables() -> dict[str, str]:
    """Each environment variable of the service with its description, for the README and ``--help``."""
    found: dict[str, str] = {}
    for name, field in Settings.model_fields.items():
        alias = field.validation_alias
        names = alias.choices if isinstance(alias, AliasChoices) else [alias or PREFIX + name.upper()]
        found.update({str(variable): field.description or "" for variable in names})
    return found


def load_settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings of this process. Raises :class:`StartupError` with a sentence that names the variable."""
    known = variables()
    for name in environ:
        if name.upper().startswith(PREFIX) and name.upper() not in known and not _KUBERNETES.fullmatch(name):
            near = difflib.get_close_matches(name.upper(), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}."
            raise StartupError(f"The environment variable {name} is not a setting of this service; {hint}")
    try:
        return Settings()
    except ValidationError as error:
        problem = error.errors()[0]
        reason = str(problem["msg"]).removeprefix("Value error, ")
        field = str(problem["loc"][0]) if problem["loc"] else ""
        name = field if field in known or not field else PREFIX + field.upper()
        raise StartupError(f"{name}: {reason}." if name else f"{reason[:1].upper()}{reason[1:]}.") from error
