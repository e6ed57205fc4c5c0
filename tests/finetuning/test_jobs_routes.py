"""The jobs API against a running service (without Ray, so nothing is trained) and the official client."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fixtures_documents import SQFT_CUSTOM_EXTRACT, SQFT_ONE_GROUP, SQFT_THREE_GROUPS
from fixtures_elastic import lora, super_adapter
from fixtures_jobs import start_and_finish, succeeded_job
from fixtures_models import save_tiny_model, tiny_model
from service_process import ServiceProcess
from sqlalchemy import select

from comps.finetuning.settings import Settings
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import CheckpointRow, JobRow
from comps.tuning.export.extract import extract
from comps.tuning.spec import ExtractSpec

ROW = b'{"instruction": "Say yes.", "input": "", "output": "yes"}\n'


@pytest.fixture(scope="module")
def adapter(server: ServiceProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A super-adapter of the tiny base model ``org/jobs``, which the service knows from here on."""
    save_tiny_model(server.models_dir / "org" / "jobs")
    directory = tmp_path_factory.mktemp("adapter")
    super_adapter(tiny_model(), lora(), directory)
    return directory


@pytest.fixture(scope="module")
def training_file(server: ServiceProcess) -> str:
    uploaded = server.openai.files.create(file=("yes.jsonl", ROW * 20), purpose="fine-tune")
    return uploaded.id


@pytest.fixture
def database(server: ServiceProcess) -> Iterator[Database]:
    """The service's own database, for the parts that its missing Ray would play."""
    database = Database(Settings(data_dir=server.data_dir).database_url)
    yield database
    database.dispose()


@pytest.fixture
def create(server: ServiceProcess, adapter: Path, training_file: str) -> Any:
    def create(**more: Any) -> httpx.Response:
        body = {"training_file": training_file, "model": "org/jobs"} | more
        return server.http.post("/v1/fine_tuning/jobs", json=body)

    return create


@pytest.fixture
def finished(server: ServiceProcess, database: Database, adapter: Path) -> str:
    base_model = server.models_dir / "org" / "jobs"
    return succeeded_job(database, server.data_dir / "jobs", base_model, adapter)


def test_a_jobs_body_begins_with_its_id_in_compact_json(create: Any) -> None:
    response = create()
    assert response.status_code == 200
    assert response.text.startswith('{"id":"ft-job')
    job = response.json()
    assert job["fine_tuning_job_id"] == job["id"]
    openai_fields = [
        "id", "created_at", "error", "fine_tuned_model", "finished_at", "hyperparameters", "model", "object",
        "organization_id", "result_files", "seed", "status", "trained_tokens", "training_file",
        "validation_file", "estimated_finish", "integrations", "metadata", "method",
    ]  # fmt: skip
    assert list(job)[: len(openai_fields)] == openai_fields
    assert all(isinstance(job[name], int) for name in ("created_at", "seed"))


@pytest.mark.parametrize("body", [SQFT_ONE_GROUP, SQFT_THREE_GROUPS], ids=["one-group", "three-groups"])
@pytest.mark.parametrize("route", ["/v1/fine_tuning/jobs", "/v1/sqft/jobs"])
def test_the_documents_requests_make_jobs(
    server: ServiceProcess, adapter: Path, training_file: str, route: str, body: dict[str, Any]
) -> None:
    content = json.dumps(body | {"training_file": "yes.jsonl", "model": "org/jobs"}).encode()
    # Without a Content-Type, as some curl lines are.
    response = httpx.post(f"{server.url}{route}", content=content)
    assert response.status_code == 200, response.text
    assert response.json()["training_file"] == training_file
    assert response.json()["warnings"] == []


def test_the_official_client_creates_lists_retrieves_and_cancels(
    server: ServiceProcess, adapter: Path, training_file: str
) -> None:
    strict = openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="None", max_retries=0, _strict_response_validation=True
    )
    jobs = strict.fine_tuning.jobs
    hyperparameters = {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": "auto"}
    made = [
        jobs.create(
            model="org/jobs", training_file=training_file, seed=3, suffix=f"n{n}", metadata={"run": "client"},
            method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        )
        for n in range(3)
    ]  # fmt: skip
    assert made[0].hyperparameters.n_epochs == 2
    assert made[0].hyperparameters.batch_size == "auto"
    assert jobs.retrieve(made[0].id).method.supervised.hyperparameters.learning_rate_multiplier == "auto"
    assert jobs.retrieve(made[0].id).id == made[0].id
    listed = [job.id for job in jobs.list(limit=2, extra_query={"metadata[run]": "client"})]
    assert listed == [job.id for job in reversed(made)]
    assert jobs.cancel(made[0].id).status == "cancelled"
    assert jobs.cancel(made[0].id).status == "cancelled"
    messages = [event.message for event in jobs.list_events(made[0].id, limit=1)]
    assert messages[-1] == f"Created fine-tuning job: {made[0].id}"
    assert messages[0] == "The job was cancelled"
    assert list(jobs.checkpoints.list(made[0].id)) == []
    with pytest.raises(openai.NotFoundError):
        jobs.retrieve("ft-job-none")


def test_opeas_routes_take_the_id_in_the_body(server: ServiceProcess, create: Any) -> None:
    body = {"fine_tuning_job_id": create().json()["id"], "extra": 1}
    retrieved = server.http.post("/v1/fine_tuning/jobs/retrieve", json=body).json()
    assert retrieved["id"] == body["fine_tuning_job_id"]
    assert retrieved["warnings"] == ["extra is not a known key and was ignored."]
    assert server.http.post("/v1/fine_tuning/jobs/cancel", json=body).json()["status"] == "cancelled"
    assert server.http.post("/v1/finetune/list_checkpoints", json=body).json() == []


def test_a_finished_job_stays_finished(server: ServiceProcess, finished: str) -> None:
    response = server.http.post(f"/v1/fine_tuning/jobs/{finished}/cancel")
    assert response.status_code == 409
    assert response.headers["x-should-retry"] == "false"
    assert response.json()["error"]["code"] == "job_has_ended"
    assert response.json()["fine_tuning_job_id"] == finished


def test_unknown_keys_warn_in_the_answer_and_as_events(server: ServiceProcess, create: Any) -> None:
    job = create(General={"lora_config": {"lora_alpa": 3}}).json()
    assert job["warnings"] == [
        "General.lora_config.lora_alpa is not a known key and was ignored; "
        "did you mean General.lora_config.lora_alpha?"
    ]
    events = server.http.get(f"/v1/fine_tuning/jobs/{job['id']}/events").json()["data"]
    assert job["warnings"][0] in [event["message"] for event in events if event["level"] == "warn"]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "org/none"}, 404, "model"),
        ({"model": "../up"}, 422, "model"),
        ({"training_file": "none"}, 404, "training_file"),
        ({"General": {"task": "dpo"}}, 422, "General.task"),
        ({"General": {"lora_config": {"r": "x"}}}, 422, "General.lora_config.r"),
        (
            {"General": {"lora_config": {"neural_lora_search": True, "nls_target_modules": ["q_proj"]}}},
            422,
            "General.lora_config.search_space",
        ),
        ({"seed": "eleven"}, 422, "seed"),
    ],
)
def test_refusals_name_the_field(create: Any, body: dict[str, Any], status: int, param: str) -> None:
    response = create(**body)
    assert response.status_code == status
    answer = response.json()
    assert answer["error"]["param"] == param
    assert answer["detail"] == answer["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"5", b"null", b'{"training_file": NaN}', b'{"seed": ' + b"9" * 5000 + b"}",
        b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b'{"model": "\\ud800"}', b'{"\\udfff": 1}',
        b'{"training_file": "a", "model": 1e999}', b'{,}', b'{"a" 1,}',
    ],
    ids=range(15),
)  # fmt: skip
@pytest.mark.parametrize("route", ["/v1/fine_tuning/jobs", "/v1/finetune/merge_adapter"])
def test_bodies_that_are_no_plain_json_are_refused(server: ServiceProcess, route: str, body: bytes) -> None:
    response = server.http.post(route, content=body)
    assert response.status_code == 422, response.text
    assert response.json()["error"]["message"].endswith(".")


def test_odd_queries_are_refused(server: ServiceProcess) -> None:
    for query in ("limit=0", "limit=x", "after=none", "metadata[]=a", 'metadata[a"]=b', "metadata[\\]=b"):
        response = server.http.get(f"/v1/fine_tuning/jobs?{query}")
        assert response.status_code == 422, query


def test_jobs_without_metadata_can_be_asked_for(server: ServiceProcess, create: Any) -> None:
    with_some, without = create(metadata={"a": "b"}).json()["id"], create().json()["id"]
    listed = server.http.get("/v1/fine_tuning/jobs", params={"metadata": "null", "limit": 1000}).json()
    ids = [job["id"] for job in listed["data"]]
    assert without in ids
    assert with_some not in ids


def test_checkpoints_come_in_both_orders_and_forms(
    server: ServiceProcess, finished: str, database: Database
) -> None:
    directory = server.data_dir / "jobs" / finished / "output"
    with database.session() as session:
        for step in (5, 10, 15):
            metrics = {"train_loss": 1.0, "valid_loss": 2.0}
            path = str(directory / f"checkpoint-{step}")
            row = CheckpointRow(id=f"ftckpt-{finished}-{step}", job_id=finished, step=step, path=path)
            row.metrics = metrics
            session.add(row)
    bare = server.http.post("/v1/finetune/list_checkpoints", json={"fine_tuning_job_id": finished}).json()
    assert [checkpoint["step_number"] for checkpoint in bare] == [5, 10, 15]
    assert bare[-1]["fine_tuned_model_checkpoint"].endswith("checkpoint-15")
    page = server.openai.fine_tuning.jobs.checkpoints.list(finished, limit=2)
    assert [checkpoint.step_number for checkpoint in page] == [15, 10, 5]
    assert page.data[0].metrics.valid_loss == 2.0
    assert page.data[0].metrics.step == 15


def test_a_log_is_given_whole_or_its_end(server: ServiceProcess, finished: str) -> None:
    url = f"/v1/fine_tuning/jobs/{finished}/logs"
    assert server.http.get(url).text == ""
    log = server.data_dir / "jobs" / finished / "log.txt"
    log.write_text("".join(f"line {n}\n" for n in range(50_000)))
    assert server.http.get(url).text == log.read_text()
    assert server.http.get(url, params={"tail": 2}).text == "line 49998\nline 49999\n"
    assert server.http.get(url, params={"tail": 60_000}).text == log.read_text()
    assert server.http.get(url, params={"tail": 0}).text == ""
    with open(log, "a") as stream:
        stream.write("unfinished")
    assert server.http.get(url, params={"tail": 1, "follow": True}).text == "unfinished"


def test_a_followed_log_grows_until_the_job_ends(server: ServiceProcess, create: Any) -> None:
    job_id = create().json()["id"]
    directory = server.data_dir / "jobs" / job_id
    url = f"/v1/fine_tuning/jobs/{job_id}/logs"
    seen = []
    with server.http.stream("GET", url, params={"follow": True}) as response:
        chunks = response.iter_text()
        directory.mkdir(exist_ok=True)
        (directory / "log.txt").write_text("first\n")
        seen.append(next(chunks))
        server.http.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
        seen += list(chunks)
    assert "".join(seen) == "first\n"


EXTRACT = ("/v1/finetune/extract_adapter", "/v1/finetune/extract_sub_adapter", "/v1/sqft/extract_sub_adapter")
MERGE = ("/v1/finetune/merge_adapter", "/v1/ffinetune/merge_adapter", "/v1/sqft/merge_adapter")


def run_next(database: Database, source: str, result: dict[str, Any] | None = None) -> None:
    """Wait for a row of ``source`` in the queue, and run it (or end it with ``result``)."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with database.reading() as session:
            job = session.scalar(select(JobRow).where(JobRow.source == source, JobRow.status == "queued"))
        if job:
            done = result or {"outcome": "succeeded"} | extract(ExtractSpec.model_validate(job.spec))
            start_and_finish(database, job.id, done)
            return
        time.sleep(0.05)


@pytest.mark.parametrize("route", EXTRACT)
def test_extraction_is_answered_when_it_is_done(
    server: ServiceProcess, finished: str, database: Database, route: str
) -> None:
    body = {"fine_tuning_job_id": finished, "sub_adapter_version": "heuristic", "odd": 1}
    runner = threading.Thread(target=run_next, args=(database, finished))
    runner.start()
    answer = server.http.post(route, json=body).json()
    runner.join()
    assert answer["fine_tuning_job_id"] == finished
    assert (answer["status"], answer["adapter_version"]) == ("succeeded", "heuristic")
    assert answer["path"] == str(server.data_dir / "jobs" / finished / "output" / "heuristic")
    assert Path(answer["path"], "adapter_model.safetensors").is_file()
    assert answer["ranks"] == [5] * 6
    assert answer["parameters"] > 0
    assert answer["warnings"] == ["odd is not a known key and was ignored."]
    again = server.http.post(route, json=body).json()
    assert again["id"] == answer["id"]
    # A pipeline posts one node's whole answer to the next.
    assert server.http.post(MERGE[0], json=answer | {"wait": False}).json()["status"] == "queued"


def test_two_extractions_at_once_are_one_run(
    server: ServiceProcess, finished: str, database: Database
) -> None:
    body = {"fine_tuning_job_id": finished, "wait": False}
    answers: list[dict[str, Any]] = []

    def ask() -> None:
        answers.append(httpx.post(f"{server.url}{EXTRACT[0]}", json=body, timeout=60).json())

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({answer["id"] for answer in answers}) == 1
    assert answers[0]["status"] == "queued"
    run = f"/v1/fine_tuning/jobs/{answers[0]['id']}"
    events = server.http.get(f"{run}/events").json()["data"]
    assert [event["message"] for event in events] == [f"Created: extract of the job {finished}"]
    assert server.http.get(f"{run}/logs").status_code == 200
    assert server.http.get(run).json()["status"] == "queued"


@pytest.mark.parametrize("route", MERGE)
def test_a_failed_merge_is_an_error_with_the_runs_sentence(
    server: ServiceProcess, finished: str, database: Database, route: str
) -> None:
    error = {"code": "invalid_model", "message": "The base model is damaged.", "param": None}
    failure = {"outcome": "failed", "error": error}
    runner = threading.Thread(target=run_next, args=(database, finished, failure))
    runner.start()
    response = server.http.post(route, json={"fine_tuning_job_id": finished})
    runner.join()
    assert response.status_code == 422
    assert response.json()["error"]["code"] == "invalid_model"
    assert response.json()["detail"] == "The base model is damaged."


def test_the_documents_trailing_comma_is_read(server: ServiceProcess, finished: str) -> None:
    content = SQFT_CUSTOM_EXTRACT.replace("JOB", finished)
    with pytest.raises(json.JSONDecodeError):
        json.loads(content)
    response = server.http.post(EXTRACT[0], content=content)
    # It is read: what is wrong is its length, for this tiny adapter.
    assert (response.status_code, response.json()["error"]["param"]) == (422, "custom_config")
    assert "6 ranks (3 groups x 2 layers)" in response.json()["detail"]


def test_a_job_object_passed_on_whole_names_its_job(server: ServiceProcess, create: Any) -> None:
    job = create().json()
    response = server.http.post(EXTRACT[0], json=job)
    assert response.status_code == 409
    assert response.json()["fine_tuning_job_id"] == job["id"]


def test_the_schema_describes_the_bodies(server: ServiceProcess) -> None:
    schema = server.http.get("/openapi.json").json()
    body = schema["paths"]["/v1/fine_tuning/jobs"]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"]["$ref"].endswith("JobRequest")
    assert "lora_config" in schema["components"]["schemas"]["GeneralBlock"]["properties"]
