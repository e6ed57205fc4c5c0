"""Searches with a real service and a real Ray: what they find is extracted; killed, they go on."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from fixtures_models import save_tiny_model
from fixtures_search import questions
from fixtures_service import (
    ENDED,
    MODEL,
    RECORDS,
    create,
    directory_of,
    local_head,
    messages,
    output_of,
    processes_end,
    succeeded,
    trainers,
    upload,
)
from service_process import ServiceProcess
from transformers import AutoModelForCausalLM

from comps.tuning.search.run import search as run_search
from comps.tuning.spec import SearchSpec

SEARCH = "/v1/finetune/search"
ONE_CORE = {"resources_per_worker": {"CPU": 1}}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    directory = tmp_path_factory.mktemp("search_service")
    save_tiny_model(directory / "data" / "models" / MODEL)
    with closing(ServiceProcess(directory, ray=True)) as service:
        yield service


@pytest.fixture(scope="module")
def source(service: ServiceProcess) -> str:
    job_id = create(service, upload(service), Dataset={"validation_split_percentage": 40})
    return str(succeeded(service, job_id)["id"])


def begin(service: ServiceProcess, source: str, **body: Any) -> str:
    response = service.http.post(SEARCH, json={"fine_tuning_job_id": source} | ONE_CORE | body)
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


def look(service: ServiceProcess, search: str) -> dict[str, Any]:
    found: dict[str, Any] = service.http.get(f"{SEARCH}/{search}").json()
    return found


def ended(service: ServiceProcess, search: str, timeout: float = 180) -> dict[str, Any]:
    deadline = time.monotonic() + timeout
    while (found := look(service, search))["status"] not in ENDED:
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    log = service.http.get(f"/v1/fine_tuning/jobs/{search}/logs").text
    assert found["status"] == "succeeded", f"{found['error']}\n{log[-3000:]}"
    return found


def test_what_a_search_finds_is_extracted_and_stock_peft_computes_it(
    service: ServiceProcess, source: str
) -> None:
    """Scored by the loss on what the training has held out, which is there without another file."""
    search = ended(service, begin(service, source, algorithm="learned", num_evals=6, population=4))
    assert (search["metric"], search["references"].keys()) == (
        "loss", {"heuristic", "minimal", "maximal", "learned"}
    )  # fmt: skip
    assert search["progress"]["step"] == search["progress"]["total_steps"] == 6
    assert search["estimated_finish"] is None
    for version in ("best", "pareto-0", "learned"):
        body = {"fine_tuning_job_id": source, "adapter_version": version}
        answer = service.http.post("/v1/finetune/extract_adapter", json=body)
        assert answer.status_code == 200, answer.text
        extracted = answer.json()
        entry = {
            "best": search["best"],
            "pareto-0": search["front"][0],
            "learned": search["references"]["learned"],
        }
        assert extracted["ranks"] == entry[version]["config"]
        assert extracted["parameters"] == entry[version]["parameters"]
        assert extracted.get("search") == (None if version == "learned" else search["id"])
        assert Path(extracted["path"]) == output_of(service, source) / version
        base = AutoModelForCausalLM.from_pretrained(service.models_dir / MODEL, dtype=torch.float32)
        adapted = peft.PeftModel.from_pretrained(base, extracted["path"])
        ranks = {m.lora_A["default"].weight.shape[0] for m in adapted.modules() if hasattr(m, "lora_A")}
        assert ranks == set(extracted["ranks"])
    merged = service.http.post(
        "/v1/finetune/merge_adapter", json={"fine_tuning_job_id": source, "adapter_version": "best"}
    )
    assert merged.status_code == 200, merged.text


def test_a_search_by_questions_leaves_its_report_over_http(service: ServiceProcess, source: str) -> None:
    file_id = upload(service, questions(), "validation.json")
    search = ended(
        service, begin(service, source, validation_file=file_id, num_evals=10, population=5, items=24)
    )
    assert (search["metric"], search["algorithm"]) == ("acc_norm", "nsga2")
    assert 0 <= search["best"]["score"] <= 1
    files = {
        name: service.http.get(f"{SEARCH}/{search['id']}/files/{name}") for name in search["report_files"]
    }
    assert {response.status_code for response in files.values()} == {200}
    rows = list(csv.DictReader(io.StringIO(files["search_progression.csv"].text)))
    assert len(rows) >= 10
    assert files["pareto_front.json"].json()["front"] == search["front"]
    assert files["search_progression.png"].headers["content-type"] == "image/png"


def test_a_search_that_cannot_be_scored_fails_with_a_sentence(service: ServiceProcess, source: str) -> None:
    other = upload(service, RECORDS[:-1], "nothing-to-choose.json")  # than what was trained on
    search = begin(service, source, validation_file=other, metric="acc")
    deadline = time.monotonic() + 120
    while (found := look(service, search))["status"] not in ENDED and time.monotonic() < deadline:
        time.sleep(0.2)
    assert found["status"] == "failed"
    assert "nothing to choose from" in found["error"]["message"]


@pytest.mark.trust
@pytest.mark.timeout(900)
def test_a_killed_search_goes_on_and_finds_what_an_undisturbed_one_finds(
    service: ServiceProcess, source: str, tmp_path: Path
) -> None:
    file_id = upload(service, questions(200), "validation.json")
    body = {"validation_file": file_id, "num_evals": 60, "population": 10, "items": 120, "halving": False}
    search = begin(service, source, **body)
    ledger = directory_of(service, search) / "evaluations.jsonl"
    deadline = time.monotonic() + 120
    while not ledger.exists() or len(ledger.read_bytes().splitlines()) < 3:
        assert time.monotonic() < deadline, messages(service, search)
        time.sleep(0.02)
    (worker,) = trainers(local_head(service), search)
    worker.kill()
    before = len(ledger.read_bytes().splitlines())
    disturbed = ended(service, search, timeout=300)
    said = messages(service, search)
    assert any("it is started again after its last batch" in message for message in said)
    resumed = next(message for message in said if message.startswith("Resuming: "))
    assert before - 2 <= int(resumed.split()[1]) <= before
    # The same search in this process, from its beginning to its end.
    spec = SearchSpec.model_validate_json((directory_of(service, search) / "spec.json").read_bytes())
    calm = run_search(spec.model_copy(update={"directory": tmp_path, "known": ()}))
    assert calm is not None
    for name in ("best", "front", "references", "finalists", "evaluations"):
        assert disturbed[name] == calm[name]


@pytest.mark.trust
@pytest.mark.timeout(900)
def test_a_cancelled_search_stops_within_seconds_and_can_be_deleted(
    service: ServiceProcess, source: str
) -> None:
    file_id = upload(service, questions(200), "validation.json")
    search = begin(
        service, source, validation_file=file_id, num_evals=5000, halving=False, algorithm="random"
    )
    deadline = time.monotonic() + 120
    while look(service, search)["progress"].get("step", 0) < 1:
        assert time.monotonic() < deadline, messages(service, search)
        time.sleep(0.1)
    assert look(service, search)["progress"]["seconds_left"] > 0
    assert service.http.post(f"{SEARCH}/{search}/cancel").json()["status"] == "cancelled"
    processes_end(service, search)
    patient = service.openai.with_options(max_retries=40)
    patient.delete(f"/finetune/search/{search}", cast_to=object)
    assert not directory_of(service, search).exists()
