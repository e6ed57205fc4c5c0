"""With several API keys each key sees its own, and what is nobody's."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx
import pytest
from fixtures_elastic import lora, super_adapter
from fixtures_jobs import add_file, succeeded_job
from fixtures_models import save_tiny_model, tiny_model
from service_process import ServiceProcess

from comps.finetuning.settings import Settings
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import CheckpointRow, EventRow, ModelRow, UploadRow

BASE = "org/owners"
MINE = hashlib.sha256(b"first").hexdigest()[:16]
JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    directory = tmp_path_factory.mktemp("service")
    with closing(ServiceProcess(directory, FINETUNING_API_KEYS="first,second")) as service:
        save_tiny_model(service.models_dir / BASE)
        yield service


@pytest.fixture(scope="module")
def things(service: ServiceProcess, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The ids of one of each kind, of the first key and of nobody."""
    adapter = tmp_path_factory.mktemp("adapter")
    super_adapter(tiny_model(), lora(), adapter)
    base = service.models_dir / BASE
    database = Database(Settings(data_dir=service.data_dir).database_url)

    def one_of_each(owner: str | None) -> dict[str, str]:
        name = "mine" if owner else "shared"
        job = succeeded_job(database, service.data_dir / "jobs", base, adapter, owner)
        file = add_file(database, f"{name}.json", owner)
        (service.data_dir / "files" / file).write_text('[{"instruction": "a", "output": "b"}]')
        with database.session() as session:
            session.add(EventRow(id=f"ftevent-{name}", job_id=job, message=name))
            session.add(CheckpointRow(id=f"ftckpt-{name}", job_id=job, step=1, path=f"{name}-1"))
            session.add(ModelRow(id=name, kind="base", path=str(base), owner=owner, details={}))
            upload = {"filename": "a", "purpose": "evals", "bytes": 1, "mime_type": "x", "owner": owner}
            session.add(UploadRow(id=f"upload-{name}", expires_at=time.time() + 3600, **upload))
        return {"job": job, "file": file, "name": name}

    made = {"mine": one_of_each(MINE), "shared": one_of_each(None)}
    database.dispose()
    return made


def client(service: ServiceProcess, key: str) -> httpx.Client:
    return httpx.Client(base_url=service.url, headers={"authorization": f"Bearer {key}"}, timeout=60)


def listed(http: httpx.Client, path: str) -> set[str]:
    return {item["id"] for item in http.get(path).json()["data"]}


def test_lists_show_what_is_ones_own_or_nobodys(service: ServiceProcess, things: Any) -> None:
    mine, shared = things["mine"], things["shared"]
    with client(service, "first") as first, client(service, "second") as second:
        for path, kind in ((JOBS, "job"), ("/v1/files", "file"), ("/v1/models", "name")):
            assert {mine[kind], shared[kind]} <= listed(first, path)
            assert shared[kind] in listed(second, path)
            assert mine[kind] not in listed(second, path)


def about(thing: dict[str, str]) -> list[tuple[str, str, Any]]:
    """The requests that only read one job, file or model."""
    job, file, name = thing["job"], thing["file"], thing["name"]
    return [
        ("GET", f"{JOBS}/{job}", None),
        ("GET", f"{JOBS}/{job}/events", None),
        ("GET", f"{JOBS}/{job}/events?after=ftevent-{name}", None),
        ("GET", f"{JOBS}/{job}/checkpoints", None),
        ("GET", f"{JOBS}/{job}/logs", None),
        ("POST", f"{JOBS}/retrieve", {"fine_tuning_job_id": job}),
        ("POST", "/v1/finetune/list_checkpoints", {"fine_tuning_job_id": job}),
        ("GET", f"/v1/files/{file}", None),
        ("GET", f"/v1/files/{file}/content", None),
        ("GET", f"/v1/uploads/upload-{name}", None),
        ("GET", f"/v1/models/{name}", None),
        ("GET", f"/v1/models/ft:org/tiny::{job}", None),
        ("GET", f"{JOBS}?after={job}", None),
        ("GET", f"/v1/files?after={file}", None),
    ]


def changes(thing: dict[str, str]) -> list[tuple[str, str, Any]]:
    """Those that would use or end it."""
    job, file, name = thing["job"], thing["file"], thing["name"]
    request = {"model": BASE, "training_file": "shared.json"}
    return [
        ("POST", f"{JOBS}/{job}/cancel", {}),
        ("POST", f"{JOBS}/cancel", {"fine_tuning_job_id": job}),
        ("POST", JOBS, request | {"training_file": file}),
        ("POST", JOBS, request | {"training_file": f"{name}.json"}),
        ("POST", JOBS, request | {"validation_file": file}),
        ("POST", JOBS, request | {"model": name}),
        ("POST", JOBS, request | {"General": {"resume_from_checkpoint": f"ftckpt-{name}"}}),
        ("POST", "/v1/finetune/extract_adapter", {"fine_tuning_job_id": job}),
        ("POST", "/v1/finetune/extract_adapter", {"model": f"ft:org/tiny::{job}"}),
        ("POST", "/v1/finetune/merge_adapter", {"fine_tuning_job_id": job}),
        ("POST", f"/v1/uploads/upload-{name}/complete", {"part_ids": ["x"]}),
        ("POST", f"/v1/uploads/upload-{name}/cancel", {}),
        ("DELETE", f"/v1/files/{file}", None),
        ("DELETE", f"/v1/models/{name}", None),
    ]


def test_another_keys_things_are_not_there(service: ServiceProcess, things: Any) -> None:
    with client(service, "first") as first, client(service, "second") as second:
        for method, path, body in about(things["mine"]):
            assert first.request(method, path, json=body).status_code == 200, path
        for method, path, body in about(things["mine"]) + changes(things["mine"]):
            answer = second.request(method, path, json=body)
            assert answer.status_code == (422 if "?after=" in path and "events" not in path else 404), path


def test_what_is_nobodys_is_everybodys_and_so_is_what_is_made_of_it(
    service: ServiceProcess, things: Any
) -> None:
    body = {"fine_tuning_job_id": things["shared"]["job"], "wait": False}
    with client(service, "first") as first, client(service, "second") as second:
        for method, path, asked in about(things["shared"]):
            assert second.request(method, path, json=asked).status_code == 200, path
        made = [http.post("/v1/finetune/extract_adapter", json=body).json() for http in (first, second)]
    assert made[0]["id"] == made[1]["id"]


def test_a_stranger_is_refused_everywhere(service: ServiceProcess, things: Any) -> None:
    with client(service, "third") as third:
        for method, path, body in about(things["shared"]) + changes(things["shared"]):
            assert third.request(method, path, json=body).status_code == 401, path


def test_parts_go_to_ones_own_uploads_and_make_ones_own_files(service: ServiceProcess, things: Any) -> None:
    path, form = "/v1/uploads/upload-mine", {"data": b"x"}
    with client(service, "first") as first, client(service, "second") as second:
        assert second.post(f"{path}/parts", files=form).status_code == 404
        part = first.post(f"{path}/parts", files=form).json()["id"]
        file_id = first.post(f"{path}/complete", json={"part_ids": [part]}).json()["file"]["id"]
        assert first.get(f"/v1/files/{file_id}").status_code == 200
        assert second.get(f"/v1/files/{file_id}").status_code == 404
    assert httpx.post(f"{service.url}{path}/parts", files=form).status_code == 401
