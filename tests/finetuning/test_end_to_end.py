"""The whole path with a real service, a real Ray and a tiny model: upload, train, extract, merge."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from fixtures_models import save_tiny_model
from fixtures_service import (
    MODEL,
    at_step,
    create,
    directory_of,
    job,
    local_head,
    output_of,
    processes_end,
    succeeded,
    trainers,
    upload,
)
from safetensors.torch import load_file
from service_process import ServiceProcess
from transformers import AutoModelForCausalLM

SPARSE_MODEL = "tiny/sparse"


@pytest.fixture(scope="module")
def ray_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    directory = tmp_path_factory.mktemp("ray_service")
    save_tiny_model(directory / "data" / "models" / MODEL)
    save_tiny_model(directory / "data" / "models" / SPARSE_MODEL, sparsity=0.5)
    with closing(ServiceProcess(directory, ray=True)) as service:
        yield service


@pytest.fixture(scope="module")
def finished(ray_server: ServiceProcess) -> dict[str, Any]:
    """An NLS job that has run to its end."""
    return succeeded(ray_server, create(ray_server, upload(ray_server)))


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        return model.eval()(ids).logits


def base_model(service: ServiceProcess) -> Any:
    return AutoModelForCausalLM.from_pretrained(service.models_dir / MODEL, dtype=torch.float32)


def test_an_nls_job_ends_with_a_stock_peft_adapter_and_its_search_space(
    ray_server: ServiceProcess, finished: dict[str, Any]
) -> None:
    output = output_of(ray_server, finished["id"])
    names = {path.name for path in output.iterdir()}
    assert names >= {
        "adapter_config.json", "adapter_model.safetensors", "nncf_config.json", "elastic_adapter_config.json",
        "tokenizer.json", "training_manifest.json",
    }  # fmt: skip
    assert finished["fine_tuned_model"]
    assert finished["trained_tokens"] > 0
    adapted = peft.PeftModel.from_pretrained(base_model(ray_server), output)
    assert not torch.allclose(logits(adapted), logits(base_model(ray_server)), atol=1e-3)


def test_the_official_client_sees_the_job_its_events_and_its_checkpoints(
    ray_server: ServiceProcess, finished: dict[str, Any]
) -> None:
    jobs = ray_server.openai.fine_tuning.jobs
    job = jobs.retrieve(finished["id"])
    assert job.status == "succeeded"
    assert job.fine_tuned_model == finished["fine_tuned_model"]
    messages = [event.message for event in jobs.list_events(finished["id"], limit=100)]
    assert any("thread(s)" in message for message in messages)
    assert any("training loss" in message for message in messages)
    steps = [each.step_number for each in jobs.checkpoints.list(finished["id"])]
    assert steps
    assert max(steps) == 22
    newest = next(each for each in jobs.checkpoints.list(finished["id"]) if each.step_number == 22)
    assert newest.metrics.train_loss is not None
    assert newest.metrics.valid_loss is not None
    assert finished["fine_tuned_model"] in [model.id for model in ray_server.openai.models.list()]


def test_the_losses_of_a_job_are_a_file_that_goes_with_it(
    ray_server: ServiceProcess, finished: dict[str, Any]
) -> None:
    (file_id,) = ray_server.openai.fine_tuning.jobs.retrieve(finished["id"]).result_files
    file = ray_server.openai.files.retrieve(file_id)
    assert (file.filename, file.purpose) == ("step_metrics.csv", "fine-tune-results")
    lines = list(csv.DictReader(io.StringIO(ray_server.openai.files.content(file_id).text)))
    assert [int(line["step"]) for line in lines] == sorted({int(line["step"]) for line in lines})
    assert float(lines[-1]["valid_loss"]) == pytest.approx(finished["progress"]["valid_loss"])
    assert float(lines[0]["train_loss"]) > 0


def test_the_loss_goes_down(ray_server: ServiceProcess, finished: dict[str, Any]) -> None:
    events = ray_server.openai.fine_tuning.jobs.list_events(finished["id"], limit=100)
    losses = [
        event.data["train_loss"] for event in events if event.type == "metrics" and "train_loss" in event.data
    ]
    assert losses[0] < 0.97 * losses[-1]  # newest first


@pytest.mark.parametrize("version", ["heuristic", "minimal", "mine"])
def test_an_extracted_sub_adapter_and_its_merged_model_compute_the_same(
    ray_server: ServiceProcess, finished: dict[str, Any], version: str
) -> None:
    body: dict[str, Any] = {"fine_tuning_job_id": finished["id"], "adapter_version": version}
    if version == "mine":
        body["custom_config"] = [8, 4, 4, 8, 2, 8]
    extracted = ray_server.http.post("/v1/finetune/extract_adapter", json=body)
    assert extracted.status_code == 200, extracted.text
    answer = extracted.json()
    assert answer["fine_tuning_job_id"] == finished["id"]
    assert answer["adapter_version"] == version
    expected = {"heuristic": [6, 6, 8, 8, 4, 4], "minimal": [4, 4, 4, 4, 2, 2], "mine": [8, 4, 4, 8, 2, 8]}
    assert [group["rank"] for group in answer["groups"]] == expected[version]

    body.pop("custom_config", None)
    merged = ray_server.http.post("/v1/finetune/merge_adapter", json=body)
    assert merged.status_code == 200, merged.text
    assert Path(merged.json()["path"]) == Path(answer["path"]) / "merged_model"
    adapted = peft.PeftModel.from_pretrained(base_model(ray_server), answer["path"])
    whole = AutoModelForCausalLM.from_pretrained(merged.json()["path"], dtype=torch.float32)
    torch.testing.assert_close(logits(whole), logits(adapted), atol=1e-5, rtol=1e-4)


def test_a_sparse_super_adapter_merges_into_a_model_with_the_same_zeros(ray_server: ServiceProcess) -> None:
    lora_config = {"sparse_adapter": True}
    job_id = create(ray_server, upload(ray_server), model=SPARSE_MODEL, General={"lora_config": lora_config})
    finished = succeeded(ray_server, job_id)
    assert ray_server.openai.models.retrieve(finished["fine_tuned_model"]).details == lora_config
    body = {"fine_tuning_job_id": job_id, "adapter_version": "heuristic"}
    extracted = ray_server.http.post("/v1/finetune/extract_adapter", json=body)
    assert extracted.status_code == 200, extracted.text
    assert extracted.json()["sparse_adapter"] is True
    answer = ray_server.http.post("/v1/sqft/merge_adapter", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["warnings"] == []
    sparsity = answer.json()["sparsity"]
    assert sparsity["before"] == sparsity["after"] == pytest.approx(0.5, abs=0.05)
    assert len(sparsity["layers"]) == 10
    before, after = (
        load_file(directory / "model.safetensors")
        for directory in (ray_server.models_dir / SPARSE_MODEL, Path(answer.json()["path"]))
    )
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in before)
    assert sum(not torch.equal(before[name], after[name]) for name in before) == 10


def test_a_cancelled_job_stops_and_stays_cancelled_until_it_is_deleted(ray_server: ServiceProcess) -> None:
    job_id = create(ray_server, upload(ray_server), Training={"epochs": 5000})
    at_step(ray_server, job_id, 1)
    assert trainers(local_head(ray_server), job_id)
    assert ray_server.openai.fine_tuning.jobs.cancel(job_id).status == "cancelled"
    refusal = ray_server.http.delete(f"/v1/fine_tuning/jobs/{job_id}")
    assert refusal.json()["error"]["code"] == "job_still_ending"
    processes_end(ray_server, job_id)
    assert job(ray_server, job_id)["status"] == "cancelled"
    delete(ray_server, job_id)


def test_a_deleted_job_takes_its_sub_adapters_and_merged_models_along(
    ray_server: ServiceProcess, finished: dict[str, Any]
) -> None:
    job_id = finished["id"]
    for route in ("extract_adapter", "merge_adapter"):
        body = {"fine_tuning_job_id": job_id, "adapter_version": "heuristic"}
        assert ray_server.http.post(f"/v1/finetune/{route}", json=body).status_code == 200
    delete(ray_server, job_id)
    assert job_id not in ray_server.http.get("/v1/models").text
    assert ray_server.http.get(f"/v1/files/{finished['result_files'][0]}").status_code == 404


def delete(service: ServiceProcess, job_id: str) -> None:
    """Delete an ended job; the client asks again as long as its processes, or a merge's, are ending."""
    patient = service.openai.with_options(max_retries=40)
    patient.delete(f"/fine_tuning/jobs/{job_id}", cast_to=object)
    assert trainers(local_head(service), job_id) == []
    assert service.http.get(f"/v1/fine_tuning/jobs/{job_id}").status_code == 404
    assert not directory_of(service, job_id).exists()
