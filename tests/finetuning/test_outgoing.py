"""Requests that the service would make on a client's behalf: a server that listens is asked by nobody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from fixtures_models import save_tiny_model
from hostile import Listener, listener
from pyarrow import parquet
from service_process import ROOT, ServiceProcess

MODEL = "org/tiny"
JOBS = "/v1/fine_tuning/jobs"
ROW = {"instruction": "Say yes.", "output": "yes"}


@pytest.fixture(scope="module")
def canary() -> Iterator[Listener]:
    with listener() as server:
        yield server


@pytest.fixture(scope="module")
def service(canary: Listener, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """A service whose hub is the listener, and which would go through it to anywhere else."""
    names = ("HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy")
    environment = dict.fromkeys(names, canary.url)
    directory = tmp_path_factory.mktemp("outgoing")
    with closing(ServiceProcess(directory, HF_HUB_OFFLINE="0", **environment)) as service:
        save_tiny_model(service.models_dir / MODEL)
        yield service


def ended(service: ServiceProcess, job_id: str) -> dict[str, Any]:
    """The job once its files and its model have been looked at."""
    deadline = time.monotonic() + 60
    while (job := service.http.get(f"{JOBS}/{job_id}").json())["status"] == "validating_files":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return dict(job)


def upload(service: ServiceProcess, name: str, content: bytes) -> str:
    answer = service.http.post("/v1/files", files={"file": (name, content)}, data={"purpose": "fine-tune"})
    return str(answer.json()["id"])


def addresses(canary: Listener) -> list[str]:
    host = f"127.0.0.1:{canary.port}"
    schemes = (
        "http",
        "https",
        "ftp",
        "s3",
        "gs",
        "hf",
        "hf://datasets",
        "smb",
        "ssh",
        "git+http",
        "zip::http",
    )
    return [
        *(f"{scheme}://{host}/org/name" for scheme in schemes),
        f"//{host}/org/name", f"\\\\{host}\\share", f"user@{host}:org/name", f"{host}/org/name", host,
        "http://169.254.169.254/latest/meta-data", "file:///etc/passwd", f"jdbc:http://{host}/x",
        f"org/name@http://{host}", f"org/name?endpoint=http://{host}", f"org/name#http://{host}",
    ]  # fmt: skip


def test_addresses_are_no_names_of_models_files_or_checkpoints(
    service: ServiceProcess, canary: Listener
) -> None:
    file = upload(service, "rows.json", json.dumps([ROW]).encode())
    job = {"model": MODEL, "training_file": file}
    for address in addresses(canary):
        for path, body in (
            (JOBS, {**job, "model": address}),
            (JOBS, {"training_file": file, "General": {"base_model": address}}),
            (JOBS, {**job, "training_file": address}),
            (JOBS, {**job, "validation_file": address}),
            (JOBS, {**job, "General": {"resume_from_checkpoint": address}}),
            ("/v1/models", {"id": "a", "path": address}),
            ("/v1/models", {"id": "a", "path": MODEL, "base_model": address}),
            ("/v1/finetune/merge_adapter", {"model": address}),
            ("/v1/finetune/extract_adapter", {"fine_tuning_job_id": address}),
        ):
            answer = service.http.post(path, json=body)
            assert 400 <= answer.status_code < 500, (address, path, answer.text)
    assert canary.asked == []


def test_data_and_fields_that_hold_addresses_are_text(
    service: ServiceProcess, canary: Listener, tmp_path: Path
) -> None:
    records = [
        {
            "instruction": f"{canary.url}/a",
            "input": f"![]({canary.url}/b)",
            "output": f"<img src={canary.url}>",
        },
        {"instruction": "{{ url }}", "output": f"@{canary.url}/c", "image": canary.url, "url": canary.url},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "rows.parquet")
    contents = {
        "rows.json": json.dumps(records).encode(),
        "rows.jsonl": "\n".join(map(json.dumps, records)).encode(),
        "rows.csv": f'instruction,output\n"=WEBSERVICE(""{canary.url}"")",{canary.url}\n'.encode(),
        f"{canary.port}.json": json.dumps([{"$ref": canary.url, **ROW}]).encode(),
        "rows.parquet": (tmp_path / "rows.parquet").read_bytes(),
    }
    for name, content in contents.items():
        body = {
            "model": MODEL,
            "training_file": upload(service, name, content),
            "metadata": {"webhook": canary.url},
            "webhook": canary.url,
            "callback_url": canary.url,
            "General": {"tokenizer_name": canary.url, "output_dir": canary.url, "proxy": canary.url},
            "Dataset": {"train_file": canary.url},
            "integrations": [{"type": "wandb", "wandb": {"project": canary.url, "host": canary.url}}],
        }
        made = service.http.post(JOBS, json=body)
        assert made.status_code == 200, made.text
        assert ended(service, made.json()["id"])["status"] == "queued", name
    assert canary.asked == []


def test_a_model_that_points_elsewhere_is_loaded_or_refused_without_asking_there(
    canary: Listener, tmp_path: Path
) -> None:
    before = len(canary.asked)
    environment = os.environ | dict.fromkeys(("HF_ENDPOINT", "http_proxy", "https_proxy"), canary.url)
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": str(ROOT)}
    environment["HF_HUB_DISABLE_TELEMETRY"] = "1"  # with it the first request of all would be another one
    command = [sys.executable, "tests/load_hostile_models.py", str(tmp_path), canary.url]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    # Its last line is about a model of the hub, whose name is the one thing that it asks for.
    assert "org/none" in done.stdout.splitlines()[-1]
    asked = canary.asked[before:]
    assert asked
    assert any(b"org/none" in each for each in asked), asked
    assert not list((tmp_path / "hub").rglob("*.py"))


def test_the_listener_would_have_heard_it(service: ServiceProcess, canary: Listener) -> None:
    """Only a name that has the form of a hub's id leads to a request, and that to the operator's hub."""
    file = upload(service, "rows.json", json.dumps([ROW] * 3).encode())
    made = service.http.post(JOBS, json={"model": "nobody/nothing", "training_file": file})
    job = ended(service, made.json()["id"])
    assert job["status"] == "failed"
    assert job["error"]["param"] == "model"
    assert any(b"nobody/nothing" in each for each in canary.asked)
