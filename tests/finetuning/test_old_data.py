"""What the first version of the service has written is taken up by this one.

``old_data/`` is the data directory of the commit 0b7a27b after it was stopped, its database as SQL and its
own path as ``@DATA@``: a job that succeeded with an extraction of it, a cancelled one, and one that was
running.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from fixtures_models import save_tiny_model
from fixtures_service import MODEL, directory_of, job, messages, output_of, succeeded
from fixtures_training import Run
from service_process import ServiceProcess

OLD = Path(__file__).with_name("old_data")


pytestmark = pytest.mark.trust


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    directory = tmp_path_factory.mktemp("old")
    data = directory / "data"
    save_tiny_model(data / "models" / MODEL)
    for area in ("files", "jobs"):
        shutil.copytree(OLD / area, data / area)
    for path in (data / "jobs").rglob("*"):
        if path.is_file() and b"@DATA@" in (content := path.read_bytes()):
            path.write_bytes(content.replace(b"@DATA@", bytes(data)))
    with closing(sqlite3.connect(data / "finetuning.db")) as database:
        database.executescript((OLD / "database.sql").read_text().replace("@DATA@", str(data)))
    with closing(ServiceProcess(directory, ray=True)) as service:
        yield service


def of_status(status: str) -> str:
    """The id that the job of this status has in the old database."""
    with closing(sqlite3.connect(":memory:")) as database:
        database.executescript((OLD / "database.sql").read_text())
        query = "SELECT id FROM jobs WHERE status = ? AND kind = 'fine_tuning'"
        (row,) = database.execute(query, (status,)).fetchall()
    return str(row[0])


def test_the_schema_is_brought_up_to_date_and_every_row_is_still_there(service: ServiceProcess) -> None:
    listed = {each["id"]: each for each in service.http.get("/v1/fine_tuning/jobs").json()["data"]}
    assert set(listed) == {of_status(status) for status in ("succeeded", "cancelled", "queued")}
    done = listed[of_status("succeeded")]
    assert (done["status"], done["suffix"], done["metadata"]) == ("succeeded", "old", {"team": "a"})
    assert (done["priority"], done["time_limit"], done["retry_limit"]) == (0, None, None)
    assert len(service.http.post("/v1/finetune/list_checkpoints", json=of(done["id"])).json()) == 2
    assert "The job has successfully completed" in messages(service, done["id"])
    (file,) = service.openai.files.list().data
    assert service.openai.files.content(file.id).read() == (OLD / "files" / file.id).read_bytes()
    kinds = {model.id: model.model_extra["kind"] for model in service.openai.models.list()}
    assert sorted(kinds.values()) == ["adapter", "base", "super_adapter"]


def of(job_id: str) -> dict[str, str]:
    return {"fine_tuning_job_id": job_id}


def test_an_old_jobs_adapter_is_extracted_and_merged(service: ServiceProcess) -> None:
    done = of_status("succeeded")
    known = service.http.post("/v1/finetune/extract_adapter", json=of(done)).json()
    assert known["path"] == str(output_of(service, done) / "heuristic")
    body = of(done) | {"adapter_version": "minimal"}
    assert service.http.post("/v1/finetune/extract_adapter", json=body).status_code == 200
    merged = service.http.post("/v1/finetune/merge_adapter", json=body)
    assert merged.status_code == 200, merged.text


def test_an_old_running_job_goes_on_from_its_checkpoint(service: ServiceProcess) -> None:
    running = of_status("queued")
    assert job(service, running)["progress"]["step"] >= 12
    succeeded(service, running)
    assert any(text.startswith("Resuming from checkpoint-") for text in messages(service, running))
    assert Run(directory_of(service, running)).checkpoints[-1] == 60
