"""Settings come from the environment, and a start that cannot work is one sentence and exit code 2."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from comps.cores.errors import StartupError
from comps.finetuning.settings import PREFIX, Settings, is_loopback, load_settings, variables


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(PREFIX) or name in variables():
            monkeypatch.delenv(name)


def run(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m comps.finetuning``, expected to end by itself."""
    settings = {"FINETUNING_PORT": "0", "FINETUNING_DATA_DIR": str(tmp_path / "data"), **environment}
    return subprocess.run(
        [sys.executable, "-m", "comps.finetuning"],
        env=os.environ | settings, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip


def test_the_defaults_are_the_documented_ones() -> None:
    settings = load_settings()
    assert (settings.host, settings.port) == ("127.0.0.1", 8015)
    assert settings.data_dir == Path.cwd() / "data"
    assert settings.models_dir == settings.data_dir / "models"
    assert settings.database_url == f"sqlite:///{settings.data_dir}/finetuning.db"
    assert settings.api_keys == ()


def test_each_variable_is_read_and_an_empty_one_means_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNING_DATA_DIR", "/srv/tuning")
    monkeypatch.setenv("FINETUNING_DATABASE_URL", "")
    monkeypatch.setenv("RAY_ADDRESS", "http://ray:8265")
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OPEA_API_KEYS", "one, two ,")
    monkeypatch.setenv("FINETUNING_OPERATOR_KEYS", "three")
    settings = load_settings()
    assert settings.models_dir == Path("/srv/tuning/models")
    assert settings.database_url == "sqlite:////srv/tuning/finetuning.db"
    assert (settings.ray_address, settings.hf_hub_offline) == ("http://ray:8265", True)
    assert [key.get_secret_value() for key in settings.api_keys] == ["one", "two"]
    assert [key.get_secret_value() for key in settings.operator_keys] == ["three"]
    assert "canary" not in repr(settings)
    assert "two" not in repr(settings)


def test_keys_from_a_file_join_those_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("first\n\n second \n")
    monkeypatch.setenv("FINETUNING_API_KEYS", "zeroth")
    monkeypatch.setenv("FINETUNING_API_KEYS_FILE", str(tmp_path / "keys"))
    keys = [key.get_secret_value() for key in load_settings().api_keys]
    assert keys == ["zeroth", "first", "second"]
    monkeypatch.delenv("FINETUNING_API_KEYS")
    assert len(load_settings().api_keys) == 2
    monkeypatch.setenv("FINETUNING_API_KEYS_FILE", str(tmp_path / "absent"))
    with pytest.raises(StartupError, match=r"FINETUNING_API_KEYS_FILE: the file .*absent cannot be read"):
        load_settings()


def test_an_empty_file_of_keys_does_not_open_the_service(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("\n")
    monkeypatch.setenv("FINETUNING_API_KEYS_FILE", str(tmp_path / "keys"))
    with pytest.raises(StartupError, match=r"FINETUNING_API_KEYS_FILE: the file .*keys holds no key"):
        load_settings()


def test_an_unknown_variable_is_an_error_that_names_the_nearest_known() -> None:
    with pytest.raises(StartupError, match=r"FINETUNING_MODEL_DIR .* did you mean FINETUNING_MODELS_DIR"):
        load_settings({"FINETUNING_MODEL_DIR": "/models"})


def test_a_wrong_value_is_an_error_that_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNING_PORT", "99999")
    with pytest.raises(StartupError, match=r"FINETUNING_PORT: .*65535"):
        load_settings()


def test_what_kubernetes_sets_for_a_service_of_this_name_is_no_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FINETUNING_PORT", "tcp://10.96.0.7:8015")
    monkeypatch.setenv("FINETUNING_SERVICE_HOST", "10.96.0.7")
    for name in ("SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT_8015_TCP", "PORT_8015_TCP_ADDR"):
        monkeypatch.setenv(f"FINETUNING_{name}", "x")
    assert (load_settings().host, load_settings().port) == ("127.0.0.1", 8015)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org"])
def test_without_keys_only_loopback_is_listened_on(host: str) -> None:
    with pytest.raises(ValueError, match="without API keys"):
        Settings(host=host)
    assert Settings(host=host, api_keys=("key",)).host == host
    assert Settings(host=host, operator_keys=("key",)).host == host
    assert Settings(host=host, allow_unauthenticated=True).host == host


def test_loopback_names_are_recognised() -> None:
    assert all(map(is_loopback, ["localhost", "127.0.0.1", "127.3.2.1", "::1"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "localhost.example.org"]))


def test_every_setting_has_a_description() -> None:
    assert all(description.endswith(".") for description in variables().values())


def test_a_wider_bind_without_keys_ends_the_command_with_one_sentence(tmp_path: Path) -> None:
    ended = run(tmp_path, FINETUNING_HOST="0.0.0.0")
    assert ended.returncode == 2
    assert ended.stderr.startswith("Without API keys the service listens on this machine only")
    assert ended.stderr.count("\n") == 1


def test_a_port_in_use_ends_the_command_with_one_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run(tmp_path, FINETUNING_PORT=str(port))
    assert ended.returncode == 2
    assert ended.stderr == f"Port {port} on 127.0.0.1 is in use; set FINETUNING_PORT to another.\n"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense", "FINETUNING_DATABASE_URL cannot be used"),
        ("postgresql://user@host/db", "URL names a postgresql database; this service works with SQLite only"),
        ("sqlite:////nowhere/x.db", "cannot be brought up to date"),
    ],
)
def test_a_database_that_cannot_be_used_ends_the_command_with_one_sentence(
    tmp_path: Path, url: str, said: str
) -> None:
    ended = run(tmp_path, FINETUNING_DATABASE_URL=url)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def test_help_lists_every_variable() -> None:
    command = [sys.executable, "-m", "comps.finetuning", "--help"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert all(name in ended.stdout for name in variables())
