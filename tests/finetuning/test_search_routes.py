"""Searches over HTTP (without Ray, so nothing is scored): what is accepted, refused, seen, extracted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fixtures_elastic import RANKS, lora, super_adapter
from fixtures_jobs import await_verdict, start_and_finish, succeeded_job
from fixtures_models import save_tiny_model, tiny_model
from fixtures_search import questions
from fixtures_service import upload
from service_process import ServiceProcess
from sqlalchemy import select

from comps.finetuning.settings import Settings
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import JobRow
from comps.tuning.spec import ExtractSpec, SearchSpec

SEARCH = "/v1/finetune/search"
EXTRACT = "/v1/finetune/extract_adapter"


def sub_adapter(*indices: int) -> dict[str, Any]:
    return {"config": [RANKS[index] for index in indices], "score": 0.5, "parameters": 1}


BEST = sub_adapter(0, 1, 2, 0, 1, 2)
FRONT = [BEST, sub_adapter(2, 2, 2, 2, 2, 1)]


def result_of(job: dict[str, Any], best: dict[str, Any] = BEST) -> dict[str, Any]:
    return {"outcome": "succeeded", "path": job["output_dir"], "metric": "acc", "best": best, "front": FRONT}


@pytest.fixture(scope="module")
def adapter(server: ServiceProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save_tiny_model(server.models_dir / "org" / "search")
    directory = tmp_path_factory.mktemp("adapter")
    super_adapter(tiny_model(), lora(), directory)
    return directory


@pytest.fixture(scope="module")
def file_id(server: ServiceProcess) -> str:
    return upload(server, questions(), "questions.json")


@pytest.fixture
def database(server: ServiceProcess) -> Iterator[Database]:
    database = Database(Settings(data_dir=server.data_dir).database_url)
    yield database
    database.dispose()


@pytest.fixture
def source(server: ServiceProcess, database: Database, adapter: Path) -> str:
    """A finished NLS job that held nothing out which is still there."""
    base_model = server.models_dir / "org" / "search"
    return succeeded_job(database, server.data_dir / "jobs", base_model, adapter)


@pytest.fixture
def begin(server: ServiceProcess, source: str, file_id: str) -> Any:
    def begin(headers: dict[str, str] | None = None, **more: Any) -> httpx.Response:
        body = {"fine_tuning_job_id": source, "validation_file": file_id} | more
        return server.http.post(SEARCH, json=body, headers=headers)

    return begin


def extractions(database: Database) -> list[JobRow]:
    with database.reading() as session:
        return list(session.scalars(select(JobRow).where(JobRow.kind == "extract")))


def refusal(response: httpx.Response, status: int, param: str) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["param"] == param
    return str(error["message"])


def test_a_search_is_answered_at_once_and_is_a_spec_in_its_row(
    server: ServiceProcess, begin: Any, source: str, file_id: str, database: Database
) -> None:
    asked = {"algorithm": "hill_climbing", "num_evals": 7, "population": 5, "seed": 3, "metric": "acc",
             "cost": "macs", "items": 16, "all_items": 40, "resources_per_worker": {"CPU": 1}}  # fmt: skip
    response = begin(**asked, num_eval=3)
    job = response.json()
    assert response.text.startswith('{"id":"search-')
    assert (job["status"], job["fine_tuning_job_id"], job["search_id"]) == (
        "validating_files", source, job["id"],
    )  # fmt: skip
    assert job["warnings"] == ["num_eval is not a known key and was ignored; did you mean num_evals?"]
    with database.reading() as session:
        row = session.scalars(select(JobRow).where(JobRow.id == job["id"])).one()
    spec = SearchSpec.model_validate(row.spec)
    for name in asked.keys() - {"resources_per_worker"}:
        assert getattr(spec, name) == asked[name]
    assert spec.resources.cpus == 1
    assert spec.validation_file == server.data_dir / "files" / file_id
    assert spec.super_adapter == server.data_dir / "jobs" / source / "output"
    await_verdict(database, job["id"])
    job["status"] = "queued"
    assert server.http.get(f"{SEARCH}/{job['id']}").json() == job
    listed = server.http.get(SEARCH, params={"limit": 1}).json()
    assert listed["data"] == [job]
    events = server.http.get(f"/v1/fine_tuning/jobs/{job['id']}/events").json()["data"]
    assert f"Created: hill_climbing search of the job {source}" in [event["message"] for event in events]
    cancelled = server.http.post(f"{SEARCH}/{job['id']}/cancel").json()
    assert cancelled["status"] == "cancelled"
    assert server.http.delete(f"{SEARCH}/{job['id']}").json()["deleted"]
    assert server.http.get(f"{SEARCH}/{job['id']}").status_code == 404


@pytest.mark.parametrize(
    ("changes", "status", "param", "reason"),
    [
        ({"algorithm": "annealing"}, 422, "algorithm", "nsga2"),
        ({"num_evals": 0}, 422, "num_evals", "greater than or equal to 1"),
        ({"num_evals": True}, 422, "num_evals", "not true or false"),
        ({"population": 3}, 422, "population", "4"),
        ({"metric": "bleu"}, 422, "metric", "acc"),
        ({"cost": "time"}, 422, "cost", "macs"),
        ({"items": 7}, 422, "items", "8"),
        ({"seed": -1}, 422, "seed", "0"),
        ({"validation_file": "nowhere.json"}, 404, "validation_file", "no stored file"),
        ({"validation_file": None}, 404, "validation_file", "no stored file"),
        ({"fine_tuning_job_id": "ft-job-none"}, 404, "fine_tuning_job_id", "no fine-tuning job"),
        ({"fine_tuning_job_id": None, "model": None}, 422, "fine_tuning_job_id", "is missing"),
        ({"fine_tuning_job_id": None, "model": "org/search"}, 404, "model", "no adapter"),
        ({"algorithm": "learned"}, 422, "algorithm", "at least 10 steps"),
        ({"resources_per_worker": {"CPU": 0}}, 422, "resources_per_worker.CPU", "1"),
    ],
)
def test_a_search_that_cannot_be_is_refused_with_the_field(
    begin: Any, changes: dict[str, Any], status: int, param: str, reason: str
) -> None:
    assert reason in refusal(begin(**changes), status, param)


def test_plain_lora_is_nothing_to_search(server: ServiceProcess, database: Database, begin: Any) -> None:
    plain = succeeded_job(database, server.data_dir / "jobs", server.models_dir / "org" / "search", None)
    assert "nothing to search" in refusal(begin(fine_tuning_job_id=plain), 422, "fine_tuning_job_id")


def test_a_registered_super_adapter_needs_a_validation_file(
    server: ServiceProcess, adapter: Path, begin: Any, database: Database
) -> None:
    shutil.copytree(adapter, server.models_dir / "foreign" / "adapter", dirs_exist_ok=True)
    body = {"id": "foreign-super", "path": "foreign/adapter", "base_model": "org/search"}
    assert server.http.post("/v1/models", json=body).status_code == 200
    foreign = {"fine_tuning_job_id": None, "model": "foreign-super"}
    assert "it is not known" in refusal(begin(**foreign, validation_file=None), 422, "validation_file")
    job = begin(**foreign).json()
    assert (job["model"], job["fine_tuning_job_id"], job["status"]) == (
        "foreign-super",
        None,
        "validating_files",
    )
    await_verdict(database, job["id"])
    start_and_finish(database, job["id"], result_of(job))
    best = {"model": "foreign-super", "adapter_version": "best", "wait": False}
    assert server.http.post(EXTRACT, json=best | {"search_id": job["id"]}).status_code == 200
    # Another adapter that is given the name later is not the one that was searched.
    (extraction,) = (each for each in extractions(database) if each.source == "foreign-super")
    server.http.post(f"/v1/fine_tuning/jobs/{extraction.id}/cancel")
    assert server.http.delete("/v1/models/foreign-super").status_code == 200
    assert server.http.post("/v1/models", json=body).status_code == 200
    assert "none of the model" in refusal(server.http.post(EXTRACT, json=best), 422, "adapter_version")


def test_the_data_trained_on_is_no_validation_and_a_test_split_is_warned_of(
    server: ServiceProcess, begin: Any, source: str, database: Database
) -> None:
    trained_on = upload(server, questions(), "train.json")
    with database.session() as session:
        session.scalars(select(JobRow).where(JobRow.id == source)).one().training_file = trained_on
    assert "was trained on this file" in refusal(begin(validation_file=trained_on), 422, "validation_file")
    again = upload(server, questions(), "same.json")
    assert "was trained on this file" in refusal(begin(validation_file=again), 422, "validation_file")
    (warning,) = begin(validation_file=upload(server, questions()[1:], "arc_test.json")).json()["warnings"]
    assert "looks like a test split" in warning
    assert begin(validation_file=upload(server, questions()[1:], "contest.json")).json()["warnings"] == []


def test_the_same_request_with_the_same_key_is_one_search(begin: Any) -> None:
    headers = {"Idempotency-Key": "search once"}
    first, second = begin(headers, num_evals=9), begin(headers, num_evals=9)
    assert first.json() == second.json()
    assert refusal(begin(headers, num_evals=10), 422, "Idempotency-Key")


def test_what_a_search_found_is_extracted_and_evaluated_by_name(
    server: ServiceProcess, begin: Any, source: str, file_id: str, database: Database
) -> None:
    def extract(**body: Any) -> httpx.Response:
        return server.http.post(EXTRACT, json={"fine_tuning_job_id": source, "wait": False} | body)

    def spec_of(response: httpx.Response) -> ExtractSpec:
        assert response.status_code == 200, response.text
        with database.reading() as session:
            row = session.scalars(select(JobRow).where(JobRow.id == response.json()["id"])).one()
        return ExtractSpec.model_validate(row.spec)

    sentence = refusal(extract(adapter_version="best"), 422, "adapter_version")
    assert "none of the job" in sentence
    assert "POST /v1/finetune/search" in sentence
    first = begin().json()
    await_verdict(database, first["id"])
    start_and_finish(database, first["id"], result_of(first))
    done = server.http.get(f"{SEARCH}/{first['id']}").json()
    assert (done["status"], done["best"], done["metric"]) == ("succeeded", BEST, "acc")

    # It need not be extracted to be evaluated.
    asked = {"fine_tuning_job_id": source, "adapter_version": "pareto-1", "file": file_id}
    evaluation = server.http.post("/v1/evaluations", json=asked).json()
    with database.reading() as session:
        row = session.scalars(select(JobRow).where(JobRow.id == evaluation["id"])).one()
    assert (row.version, row.spec["config"]) == ("pareto-1", FRONT[1]["config"])
    server.http.post(f"/v1/evaluations/{evaluation['id']}/cancel")

    best = spec_of(extract(adapter_version="best"))
    assert (list(best.config or ()), best.search, best.version) == (BEST["config"], first["id"], "best")
    front = spec_of(extract(adapter_version="pareto-1"))
    assert list(front.config or ()) == FRONT[1]["config"]
    assert "pareto-0 to pareto-1" in refusal(extract(adapter_version="pareto-2"), 422, "adapter_version")
    kept = extract(adapter_version="pareto-0", custom_config=BEST["config"])
    assert "is kept for what a search finds" in refusal(kept, 422, "adapter_version")
    assert "no search 'search-x'" in refusal(
        extract(adapter_version="best", search_id="search-x"), 422, "search_id"
    )

    def ranks(**body: Any) -> list[int]:
        answer = server.http.post("/v1/evaluations", json=asked | {"adapter_version": "best"} | body).json()
        server.http.post(f"/v1/evaluations/{answer['id']}/cancel")
        with database.reading() as session:
            row = session.scalars(select(JobRow).where(JobRow.id == answer["id"])).one()
        return list(row.spec["config"])

    # A newer search has found something else: the version that is there stays, and it is said whose it is.
    second = begin().json()
    await_verdict(database, second["id"])
    start_and_finish(database, second["id"], result_of(second, FRONT[1]))
    assert first["id"] in refusal(extract(adapter_version="best"), 409, "adapter_version")
    assert spec_of(extract(adapter_version="best", search_id=first["id"])) == best
    said = refusal(
        server.http.post("/v1/evaluations", json=asked | {"adapter_version": "best"}), 409, "adapter_version"
    )
    assert first["id"] in said
    assert second["id"] in said
    assert ranks(search_id=first["id"]) == BEST["config"]
    assert ranks(search_id=second["id"]) == FRONT[1]["config"]
    # A pipeline passes the search on as it is, and means what it has found.
    passed_on = server.http.post(EXTRACT, json=done | {"wait": False})
    assert spec_of(passed_on) == best


def test_questions_that_cannot_be_scored_end_a_search_before_it_waits(
    server: ServiceProcess, begin: Any, database: Database
) -> None:
    rows = [{"instruction": "Add.", "input": "1, 2", "output": "3"}] * 9
    job = begin(validation_file=upload(server, rows, "sums.json"), metric="acc").json()
    await_verdict(database, job["id"])
    error = server.http.get(f"{SEARCH}/{job['id']}").json()["error"]
    assert (error["code"], error["param"]) == ("invalid_validation_file", "validation_file")
    assert error["message"].startswith("sums.json, record 1: has nothing to choose from")


def test_a_search_keeps_what_it_reads_from_being_deleted(
    server: ServiceProcess, begin: Any, source: str
) -> None:
    file_id = upload(server, questions(), "kept.json")
    search = begin(validation_file=file_id).json()["id"]
    assert server.http.delete(f"/v1/files/{file_id}").status_code == 409
    assert search in server.http.delete(f"/v1/fine_tuning/jobs/{source}").text
    assert "cancel it first" in refusal(server.http.delete(f"{SEARCH}/{search}"), 409, "fine_tuning_job_id")
    server.http.post(f"{SEARCH}/{search}/cancel")
    assert server.http.delete(f"/v1/fine_tuning/jobs/{source}").status_code == 200
    assert server.http.get(f"{SEARCH}/{search}").status_code == 404


def test_files_of_a_search_are_there_when_it_has_succeeded(
    server: ServiceProcess, begin: Any, database: Database
) -> None:
    job = begin().json()
    await_verdict(database, job["id"])
    path = f"{SEARCH}/{job['id']}/files/search_progression.csv"
    assert "is queued" in refusal(server.http.get(path), 404, "name")
    output = Path(job["output_dir"])
    output.mkdir(parents=True)
    (output / "search_progression.csv").write_text("config\n")
    (output.parent / "spec.json").write_text(json.dumps({}))
    start_and_finish(database, job["id"], result_of(job))
    response = server.http.get(path)
    assert (response.text, response.headers["content-type"].partition(";")[0]) == ("config\n", "text/csv")
    for other in ("spec.json", "..%2Fspec.json", "nothing.csv"):
        assert server.http.get(f"{SEARCH}/{job['id']}/files/{other}").status_code in (404, 422)


@pytest.mark.parametrize("shared", [False, True], ids=["alice's job", "a job of nobody"])
def test_another_keys_searches_are_not_there(make_server: Any, adapter: Path, shared: bool) -> None:
    service = make_server(FINETUNING_API_KEYS="alice,bob")
    save_tiny_model(service.models_dir / "org" / "search")
    database = Database(Settings(data_dir=service.data_dir).database_url)
    alice, bob = ({"Authorization": f"Bearer {key}"} for key in ("alice", "bob"))
    content = json.dumps(questions()).encode()
    form = {"files": {"file": ("q.json", content)}, "data": {"purpose": "fine-tune"}}
    file_id = service.http.post("/v1/files", headers=alice, **form).json()["id"]
    with database.reading() as session:
        from comps.finetuning.store.tables import FileRow

        owner = session.scalars(select(FileRow.owner)).one()
    source = succeeded_job(
        database, service.data_dir / "jobs", service.models_dir / "org" / "search", adapter,
        None if shared else owner,
    )  # fmt: skip
    database.dispose()
    body = {"fine_tuning_job_id": source, "validation_file": file_id}
    assert service.http.post(SEARCH, json=body, headers=bob).status_code == 404
    search = service.http.post(SEARCH, json=body, headers=alice).json()["id"]
    assert [each["id"] for each in service.http.get(SEARCH, headers=alice).json()["data"]] == [search]
    assert service.http.get(SEARCH, headers=bob).json()["data"] == []
    for method, path in (
        ("GET", ""),
        ("POST", "/cancel"),
        ("DELETE", ""),
        ("GET", "/files/pareto_front.json"),
    ):
        assert service.http.request(method, f"{SEARCH}/{search}{path}", headers=bob).status_code == 404
    assert service.http.get(f"{SEARCH}/{search}").status_code in (200, 401)
