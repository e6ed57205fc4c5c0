"""With several API keys each key sees its own, and what is nobody's; an operator's sees everything."""

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
MINE, OPERATORS = (hashlib.sha256(key).hexdigest()[:16] for key in (b"first", b"operator"))
JOBS = "/v1/fine_tuning/jobs"
ROWS = '[{"instruction": "a", "output": "b"}]'


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    directory = tmp_path_factory.mktemp("service")
    keys = {"FINETUNING_API_KEYS": "first,second", "FINETUNING_OPERATOR_KEYS": "operator"}
    with closing(ServiceProcess(directory, **keys)) as service:
        save_tiny_model(service.models_dir / BASE)
        yield service


@pytest.fixture(scope="module")
def things(service: ServiceProcess, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The ids of one of each kind, of the first key and of nobody."""
    adapter = tmp_path_factory.mktemp("adapter")
    super_adapter(tiny_model(), lora(), adapter)
    base = service.models_dir / BASE
    database = Database(Settings(data_dir=service.data_dir).database_url)

    def one_of_each(name: str, owner: str | None) -> dict[str, str]:
        job = succeeded_job(database, service.data_dir / "jobs", base, adapter, owner)
        file = add_file(database, f"{name}.json", owner)
        (service.data_dir / "files" / file).write_text(ROWS)
        with database.session() as session:
            session.add(EventRow(id=f"ftevent-{name}", job_id=job, message=name))
            session.add(CheckpointRow(id=f"ftckpt-{name}", job_id=job, step=1, path=f"{name}-1"))
            session.add(ModelRow(id=name, kind="base", path=str(base), owner=owner, details={}))
            upload = {"filename": "a", "purpose": "evals", "bytes": 1, "mime_type": "x", "owner": owner}
            session.add(UploadRow(id=f"upload-{name}", expires_at=time.time() + 3600, **upload))
        return {"job": job, "file": file, "name": name}

    owners = {"mine": MINE, "shared": None, "operators": OPERATORS}
    made = {name: one_of_each(name, owner) for name, owner in owners.items()}
    database.dispose()
    return made


def client(service: ServiceProcess, key: str) -> httpx.Client:
    return httpx.Client(base_url=service.url, headers={"authorization": f"Bearer {key}"}, timeout=60)


def listed(http: httpx.Client, path: str) -> set[str]:
    return {item["id"] for item in http.get(path).json()["data"]}


def test_lists_show_what_is_ones_own_or_nobodys_and_an_operator_everything(
    service: ServiceProcess, things: Any
) -> None:
    mine, shared, operators = things["mine"], things["shared"], things["operators"]
    with client(service, "first") as first, client(service, "second") as second:
        for path, kind in ((JOBS, "job"), ("/v1/files", "file"), ("/v1/models", "name")):
            assert {mine[kind], shared[kind]} <= listed(first, path)
            assert shared[kind] in listed(second, path)
            assert mine[kind] not in listed(second, path)
            assert operators[kind] not in listed(first, path)
    with client(service, "operator") as operator:
        for path, kind in ((JOBS, "job"), ("/v1/files", "file"), ("/v1/models", "name")):
            assert {mine[kind], shared[kind], operators[kind]} <= listed(operator, path)


def about(thing: dict[str, str]) -> list[tuple[str, str, Any]]:
    """The requests that only read one job, file or model."""
    job, file, name = thing["job"], thing["file"], thing["name"]
    return [
        ("GET", f"{JOBS}/{job}", None),
        ("GET", f"{JOBS}/{job}/events", None),
        ("GET", f"{JOBS}/{job}/events?after=ftevent-{name}", None),
        ("GET", f"{JOBS}/{job}/events?stream=true", None),
        ("GET", f"{JOBS}/{job}/events?stream=true&after=ftevent-{name}", None),
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
        ("DELETE", f"{JOBS}/{job}", None),
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


@pytest.mark.parametrize("whose", ["mine", "operators"])
def test_another_keys_things_are_not_there(service: ServiceProcess, things: Any, whose: str) -> None:
    thing = things[whose]
    with client(service, "first" if whose == "mine" else "operator") as owner:
        for method, path, body in about(thing):
            assert owner.request(method, path, json=body).status_code == 200, path
    with client(service, "second") as second:
        for method, path, body in about(thing) + changes(thing):
            answer = second.request(method, path, json=body)
            assert answer.status_code == (422 if "?after=" in path and "events" not in path else 404), path


def test_an_operator_sees_and_changes_what_is_another_keys(service: ServiceProcess, things: Any) -> None:
    request = {"model": BASE, "training_file": "shared.json"}
    with client(service, "first") as first, client(service, "operator") as operator:
        for method, path, body in about(things["mine"]):
            assert operator.request(method, path, json=body).status_code == 200, path
        content = {"file": ("f", ROWS)}
        file = first.post("/v1/files", data={"purpose": "fine-tune"}, files=content).json()["id"]
        job = first.post(JOBS, json=request | {"training_file": file}).json()["id"]
        assert operator.post(f"{JOBS}/{job}/cancel").json()["status"] == "cancelled"
        assert first.get(f"{JOBS}/{job}").json()["status"] == "cancelled"

        # What it makes is its own, also when it is made with another one's things.
        made = operator.post(JOBS, json=request | {"training_file": file})
        assert made.status_code == 200, made.text
        assert first.get(f"{JOBS}/{made.json()['id']}").status_code == 404
        assert operator.post(f"{JOBS}/{made.json()['id']}/cancel").status_code == 200
        assert operator.delete(f"/v1/files/{file}").json()["deleted"]
        assert first.get(f"/v1/files/{file}").status_code == 404


def test_what_is_nobodys_is_everybodys_and_so_is_what_is_made_of_it(
    service: ServiceProcess, things: Any
) -> None:
    body = {"fine_tuning_job_id": things["shared"]["job"], "wait": False}
    with client(service, "first") as first, client(service, "second") as second:
        for method, path, asked in about(things["shared"]):
            assert second.request(method, path, json=asked).status_code == 200, path
        made = [http.post("/v1/finetune/extract_adapter", json=body).json() for http in (first, second)]
    assert made[0]["id"] == made[1]["id"]


def test_idempotency_keys_are_each_ones_own(service: ServiceProcess, things: Any) -> None:
    body = {"model": BASE, "training_file": things["shared"]["file"], "metadata": {"by": "key"}}
    made = []
    for key in ("first", "second", "operator"):
        with client(service, key) as http:
            for _ in range(2):
                made.append(http.post(JOBS, json=body, headers={"Idempotency-Key": "one"}).json()["id"])
            assert listed(http, f"{JOBS}?metadata[by]=key") == ({*made} if key == "operator" else {made[-1]})
            http.post(f"{JOBS}/{made[-1]}/cancel")
    assert len(set(made)) == 3


def test_a_refusal_does_not_name_what_is_another_keys(service: ServiceProcess, things: Any) -> None:
    shared = things["shared"]
    with client(service, "first") as first, client(service, "second") as second:
        request = {"model": shared["name"], "training_file": shared["file"]}
        job = first.post(JOBS, json=request).json()["id"]
        for path in (f"/v1/files/{shared['file']}", f"/v1/models/{shared['name']}"):
            assert job in first.delete(path).json()["detail"]
            refusal = second.delete(path)
            assert refusal.status_code == 409
            assert "is used by a job of another API key, which has not ended" in refusal.json()["detail"]
        first.post(f"{JOBS}/{job}/cancel")


def test_an_operators_key_alone_closes_the_service_to_strangers(make_server: Any) -> None:
    service = make_server(FINETUNING_OPERATOR_KEYS="operator")
    assert service.http.get("/v1/files").status_code == 401
    with client(service, "operator") as operator:
        assert operator.get("/v1/files").json()["data"] == []
    assert "operator" not in service.log


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
