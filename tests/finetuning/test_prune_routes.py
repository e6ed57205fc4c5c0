"""Pruning over HTTP: what is refused, what is kept apart, and the whole way with a real Ray."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from fixtures_models import save_tiny_model
from fixtures_service import (
    MODEL,
    RECORDS,
    create,
    events,
    job,
    local_head,
    messages,
    processes_end,
    succeeded,
    trainers,
    upload,
    wait_until,
)
from safetensors.torch import load_file, save_file
from service_process import ServiceProcess

BASE = "org/prune"
PRUNE = "/v1/sqft/prune"
GOOD: dict[str, Any] = {
    "model": BASE, "sparsity": 0.5, "method": "magnitude", "wait": False, "resources_per_worker": {"CPU": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def calibration(server: ServiceProcess) -> str:
    """A calibration file; the service knows the base model :data:`BASE` from here on."""
    save_tiny_model(server.models_dir / BASE)
    save_tiny_model(server.models_dir / "org" / "mute", tokenizer=False)
    return upload(server, name="calibration.json")


def ask(service: ServiceProcess, key: str | None = None, **changes: Any) -> tuple[int, dict[str, Any]]:
    headers = {"Idempotency-Key": key} if key else {}
    answer = service.http.post(PRUNE, json={**GOOD, **changes}, headers=headers)
    return answer.status_code, answer.json()


BAD = {
    "no model": ({"model": None}, 422, "model"),
    "an unknown model": ({"model": "org/none"}, 404, "model"),
    "a path": ({"model": "../../etc"}, 422, "model"),
    "neither sparsity nor pattern": ({"sparsity": None}, 422, "sparsity"),
    "both": ({"pattern": "2:4"}, 422, "pattern"),
    "nothing pruned": ({"sparsity": 0}, 422, "sparsity"),
    "everything pruned": ({"sparsity": 1}, 422, "sparsity"),
    "true": ({"sparsity": True}, 422, "sparsity"),
    "an unknown pattern": ({"sparsity": None, "pattern": "1:2"}, 422, "pattern"),
    "an unknown method": ({"method": "sparsegpt"}, 422, "method"),
    "wanda without data": ({"method": "wanda"}, 422, "calibration_file"),
    "no such data": ({"method": "wanda", "calibration_file": "none.json"}, 404, "calibration_file"),
    "no rows": ({"calibration_samples": 0}, 422, "calibration_samples"),
    "no tokens": ({"max_length": 1}, 422, "max_length"),
    "a name that is a path": ({"name": "../x"}, 422, "name"),
    "a name of the service's": ({"name": "ft:x"}, 422, "name"),
    "the name of a directory": ({"name": BASE}, 409, "name"),
    "a seed that is none": ({"seed": -1}, 422, "seed"),
    "no cores": ({"resources_per_worker": {"CPU": 0}}, 422, "resources_per_worker.CPU"),
}


@pytest.mark.parametrize(("changes", "status", "param"), BAD.values(), ids=BAD.keys())
def test_a_wrong_request_is_refused_by_the_name_of_its_field(
    server: ServiceProcess, calibration: str, changes: dict[str, Any], status: int, param: str
) -> None:
    code, body = ask(server, **changes)
    assert (code, body["error"]["param"]) == (status, param), body


def test_wanda_needs_a_tokenizer_and_magnitude_does_not(server: ServiceProcess, calibration: str) -> None:
    code, body = ask(server, model="org/mute", method="wanda", calibration_file=calibration)
    assert (code, body["error"]["code"]) == (422, "invalid_model")
    code, body = ask(server, model="org/mute")
    assert code == 200
    cancel(server, body["id"])


def cancel(service: ServiceProcess, job_id: str) -> None:
    assert service.openai.fine_tuning.jobs.cancel(job_id).status == "cancelled"


def test_a_pruning_is_a_job_that_can_be_looked_at_cancelled_and_deleted(
    server: ServiceProcess, client: openai.OpenAI, calibration: str
) -> None:
    code, made = ask(server, method="wanda", calibration_file="calibration.json", sparsty=0.7)
    assert code == 200
    assert made["id"].startswith("prune-")
    assert (made["object"], made["model"], made["fine_tuned_model"]) == ("sqft.prune", BASE, None)
    assert made["warnings"] == ["sparsty is not a known key and was ignored; did you mean sparsity?"]
    # There is no Ray here, so it waits once its file is read.
    wait_until(server, made["id"], lambda answer: answer["status"] == "queued")
    assert client.fine_tuning.jobs.retrieve(made["id"]).model == BASE
    assert made["id"] not in [each.id for each in client.fine_tuning.jobs.list()]
    assert "Files validated, the job is queued" in messages(server, made["id"])
    assert made["warnings"][0] in messages(server, made["id"])
    refusal = server.http.delete(f"/v1/files/{calibration}")
    assert refusal.status_code == 409
    assert made["id"] in refusal.json()["detail"]
    assert server.http.delete(f"/v1/fine_tuning/jobs/{made['id']}").status_code == 409
    cancel(server, made["id"])
    assert server.http.delete(f"/v1/fine_tuning/jobs/{made['id']}").status_code == 200
    assert server.http.get(f"/v1/fine_tuning/jobs/{made['id']}").status_code == 404


def test_calibration_data_is_read_before_anything_is_begun(server: ServiceProcess, calibration: str) -> None:
    file = upload(server, [{"question": "?"}], "questions.json")
    _, made = ask(server, method="wanda", calibration_file=file)
    deadline = time.monotonic() + 60
    while (failed := job(server, made["id"]))["status"] != "failed" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert failed["error"]["code"] == "invalid_calibration_file"
    assert failed["error"]["param"] == "calibration_file"
    assert "questions.json, record 1" in failed["error"]["message"]


def test_a_name_belongs_to_who_asks_first(server: ServiceProcess, calibration: str) -> None:
    _, made = ask(server, name="mine/sparse")
    code, body = ask(server, name="mine/sparse")
    assert (code, body["error"]["param"]) == (409, "name")
    assert made["id"] in body["error"]["message"]
    save_tiny_model(server.models_dir / "elsewhere")
    register = {"id": "mine/sparse", "path": "elsewhere"}
    assert server.http.post("/v1/models", json=register).status_code == 409
    cancel(server, made["id"])
    assert server.http.post("/v1/models", json=register).status_code == 200
    assert ask(server, name="mine/sparse")[0] == 409


def test_one_key_is_one_pruning(server: ServiceProcess, calibration: str) -> None:
    first, again = ask(server, "prune-key"), ask(server, "prune-key")
    assert first[0] == again[0] == 200
    assert first[1]["id"] == again[1]["id"]
    assert ask(server, "prune-key", sparsity=0.6)[0] == 422
    cancel(server, first[1]["id"])


def test_the_zeros_of_a_model_on_disk_are_told_by_layer(server: ServiceProcess) -> None:
    directory = save_tiny_model(server.models_dir / "org" / "half")
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    tensors[f"{name}.weight"][::2] = 0
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    model = server.http.get("/v1/models/org/half").json()
    layers = model["sparsity"].pop("layers")
    assert model["warnings"] == []
    assert {layer: value for layer, value in layers.items() if value} == {name: 0.5}
    assert len(layers) == 14
    assert model["sparsity"]["total"] == model["sparsity"]["zeros"] / model["sparsity"]["weights"]
    tensors[f"{name}.weight"][:] = 0
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    again = server.http.get("/v1/models/org/half").json()
    assert again["sparsity"]["layers"][name] == 1


def test_a_damaged_model_is_looked_at_with_a_warning(server: ServiceProcess) -> None:
    directory = save_tiny_model(server.models_dir / "org" / "torn")
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    model = server.http.get("/v1/models/org/torn").json()
    assert model["sparsity"] is None
    assert "truncated" in model["warnings"][0]


@pytest.fixture(scope="module")
def ray_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    directory = tmp_path_factory.mktemp("prune_service")
    save_tiny_model(directory / "data" / "models" / MODEL)
    with closing(ServiceProcess(directory, ray=True)) as service:
        yield service


def zeros_by_layer(directory: Path) -> dict[str, float]:
    return {
        name.removesuffix(".weight"): float((tensor == 0).double().mean())
        for name, tensor in load_file(directory / "model.safetensors").items()
        if name.endswith("proj.weight")
    }


def test_a_pruned_model_is_a_base_model_with_a_parent_which_may_go(
    ray_server: ServiceProcess, tmp_path: Path
) -> None:
    upload(ray_server)
    body = {
        **GOOD, "model": MODEL, "method": "wanda", "calibration_file": "numbers.json", "wait": True,
        "calibration_samples": 16, "name": "tiny/half",
    }  # fmt: skip
    answer = ray_server.http.post(PRUNE, json=body, timeout=180)
    assert answer.status_code == 200, answer.text
    made = answer.json()
    assert (made["status"], made["model"], made["fine_tuned_model"]) == ("succeeded", MODEL, "tiny/half")
    assert made["calibration"]["samples"] == 16
    found = zeros_by_layer(Path(made["path"]))
    assert made["sparsity"]["layers"] == found
    assert found == dict.fromkeys(found, 0.5)
    told = [event for event in events(ray_server, made["id"]) if event["data"].get("type") == "progress"]
    assert [event["data"]["step"] for event in told] == [1, 2]
    assert job(ray_server, made["id"])["progress"]["total_steps"] == 2

    listed = {model.id: model for model in ray_server.openai.models.list()}["tiny/half"].model_extra
    assert listed is not None
    assert (listed["kind"], listed["base_model"], listed["job_id"]) == ("base", MODEL, made["id"])
    assert listed["sparsity"] == {k: v for k, v in made["sparsity"].items() if k != "layers"}
    model = ray_server.http.get("/v1/models/tiny/half").json()
    assert model["sparsity"] == made["sparsity"]
    assert (model["details"]["method"], model["details"]["target"]) == ("wanda", 0.5)

    # It is trained on and pruned further like any base model.
    trained = succeeded(ray_server, create(ray_server, "numbers.json", model="tiny/half"))
    merging = {"fine_tuning_job_id": trained["id"]}
    merged = ray_server.http.post("/v1/finetune/merge_adapter", json=merging, timeout=180).json()
    (warning,) = merged["warnings"]
    assert warning.startswith("The merge filled zeros: 50.0% of the weights of the adapted modules were 0")
    assert warning in [event["message"] for event in events(ray_server, merged["id"])]
    assert job(ray_server, merged["id"])["warnings"] == [warning]
    further = ray_server.http.post(
        PRUNE,
        json={**GOOD, "model": "tiny/half", "sparsity": None, "pattern": "2:4", "wait": True},
        timeout=180,
    ).json()
    assert further["fine_tuned_model"] == f"tiny/half:magnitude-2:4:{further['id']}"
    before, after = (load_file(Path(each["path"]) / "model.safetensors") for each in (made, further))
    assert all(torch.all(after[name][tensor == 0] == 0) for name, tensor in before.items())
    for name in found:
        groups = after[f"{name}.weight"].reshape(-1, 4)
        assert int((groups != 0).sum(1).max()) <= 2

    refusal = ray_server.http.delete("/v1/models/tiny/half")
    assert refusal.status_code == 409
    assert trained["fine_tuned_model"] in refusal.json()["detail"]
    patient = ray_server.openai.with_options(max_retries=40)
    patient.delete(f"/fine_tuning/jobs/{trained['id']}", cast_to=object)
    assert ray_server.http.delete("/v1/models/tiny/half").status_code == 200
    assert not Path(made["path"]).exists()
    assert ray_server.http.get(f"/v1/models/{further['fine_tuned_model']}").status_code == 200
    patient.delete(f"/fine_tuning/jobs/{further['id']}", cast_to=object)
    assert not Path(further["path"]).exists()
    assert further["id"] not in ray_server.http.get("/v1/models").text


def test_a_pruning_that_cannot_be_done_answers_with_the_reason(ray_server: ServiceProcess) -> None:
    save_tiny_model(ray_server.models_dir / "tiny" / "odd", intermediate_size=66)
    body = {**GOOD, "model": "tiny/odd", "sparsity": None, "pattern": "4:8", "wait": True}
    answer = ray_server.http.post(PRUNE, json=body, timeout=180)
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "pattern"
    assert "down_proj has 66 inputs" in answer.json()["detail"]


@pytest.mark.trust
def test_a_pruning_whose_process_is_killed_begins_anew(ray_server: ServiceProcess) -> None:
    upload(ray_server)
    body = {**GOOD, "model": MODEL, "method": "wanda", "calibration_file": "numbers.json"}
    made = ray_server.http.post(PRUNE, json=body).json()
    head = local_head(ray_server)
    deadline = time.monotonic() + 60
    while not (found := trainers(head, made["id"])) and time.monotonic() < deadline:
        time.sleep(0.05)
    found[0].kill()
    done = succeeded(ray_server, made["id"])
    assert any("it is started again" in message for message in messages(ray_server, made["id"]))
    output = Path(made["path"])
    assert set(zeros_by_layer(output).values()) == {0.5}
    processes_end(ray_server, made["id"])
    assert [path.name for path in output.parent.iterdir() if path.name.endswith((".tmp", ".old"))] == []
    assert ray_server.http.get(f"/v1/models/{done['fine_tuned_model']}").status_code == 200


@pytest.mark.trust
def test_a_cancelled_pruning_leaves_its_cores_and_no_model(ray_server: ServiceProcess) -> None:
    save_tiny_model(ray_server.models_dir / "tiny" / "deep", num_hidden_layers=60)
    upload(ray_server, RECORDS * 10, "many.json")
    body = {
        **GOOD, "model": "tiny/deep", "method": "wanda", "calibration_file": "many.json",
        "calibration_samples": 480,
    }  # fmt: skip
    made = ray_server.http.post(PRUNE, json=body).json()
    wait_until(ray_server, made["id"], lambda answer: answer["progress"].get("step", 0) >= 2)
    cancel(ray_server, made["id"])
    processes_end(ray_server, made["id"])
    assert not Path(made["path"]).exists()
    assert made["id"] not in ray_server.http.get("/v1/models").text
