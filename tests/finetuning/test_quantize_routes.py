"""INT4 over HTTP: what is refused, and the whole way from a sparse model to one sparse INT4 model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import torch
from fixtures_elastic import tokens
from fixtures_models import save_tiny_model
from fixtures_quantised import sparsify
from fixtures_service import create, job, messages, succeeded, upload
from safetensors.torch import load_file
from service_process import ServiceProcess

from comps.tuning.models.load import load_base_model
from comps.tuning.spec import ModelSpec

BASE = "org/quantize"
HALF = "tiny/half"  # half of its weights are zero
QUANTIZE = "/v1/sqft/quantize"
SHORT = {"Training": {"max_train_steps": 3}}
GOOD: dict[str, Any] = {
    "model": BASE, "group_size": 32, "wait": False, "resources_per_worker": {"CPU": 1},
}  # fmt: skip


def ask(service: ServiceProcess, key: str | None = None, **changes: Any) -> tuple[int, dict[str, Any]]:
    headers = {"Idempotency-Key": key} if key else {}
    answer = service.http.post(QUANTIZE, json={**GOOD, **changes}, headers=headers, timeout=180)
    return answer.status_code, answer.json()


BAD = {
    "no model": ({"model": None}, 422, "model"),
    "an unknown model": ({"model": "org/none"}, 404, "model"),
    "an unknown mode": ({"mode": "int3"}, 422, "mode"),
    "a group of another size": ({"group_size": 48}, 422, "group_size"),
    "half of the embeddings": ({"embeddings": "int4"}, 422, "embeddings"),
    "gptq without data": ({"method": "gptq"}, 422, "calibration_file"),
    "no such data": ({"method": "gptq", "calibration_file": "none.json"}, 404, "calibration_file"),
    "the name of a directory": ({"name": BASE}, 409, "name"),
}


@pytest.mark.parametrize(("changes", "status", "param"), BAD.values(), ids=BAD.keys())
def test_a_wrong_request_is_refused_by_the_name_of_its_field(
    server: ServiceProcess, changes: dict[str, Any], status: int, param: str
) -> None:
    save_tiny_model(server.models_dir / BASE)
    code, body = ask(server, **changes)
    assert (code, body["error"]["param"]) == (status, param), body


def test_one_key_is_one_quantisation_which_can_be_cancelled(server: ServiceProcess) -> None:
    save_tiny_model(server.models_dir / BASE)
    first, again = ask(server, "quantize-key", group_size="32"), ask(server, "quantize-key", group_size="32")
    assert first[0] == again[0] == 200, first
    assert first[1]["id"] == again[1]["id"]
    assert first[1]["object"] == "sqft.quantize"
    assert ask(server, "quantize-key", group_size=64)[0] == 422
    assert server.openai.fine_tuning.jobs.cancel(first[1]["id"]).status == "cancelled"


@pytest.fixture(scope="module")
def ray_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    directory = tmp_path_factory.mktemp("quantize_service")
    sparsify(save_tiny_model(directory / "data" / "models" / HALF))
    with closing(ServiceProcess(directory, ray=True)) as service:
        yield service


@pytest.mark.timeout(600)
def test_from_a_sparse_model_to_one_sparse_int4_model(ray_server: ServiceProcess) -> None:
    """Quantise it; train on that, and within the rounding; extract, merge, run it in OpenVINO."""
    ov = pytest.importorskip("openvino")
    upload(ray_server)
    code, made = ask(
        ray_server, model=HALF, name="tiny/int4", method="gptq", calibration_file="numbers.json",
        calibration_samples=16, wait=True,
    )  # fmt: skip
    assert code == 200, made
    assert (made["status"], made["fine_tuned_model"]) == ("succeeded", "tiny/int4")
    assert made["sparsity"]["total"] >= made["sparsity_before"] > 0.49
    model = ray_server.http.get("/v1/models/tiny/int4").json()
    assert (model["kind"], model["base_model"], model["sparsity"]) == ("base", HALF, made["sparsity"])

    # A plain adapter is trained on it, and cannot be merged into integers.
    plain = succeeded(ray_server, create(ray_server, "numbers.json", model="tiny/int4", **SHORT))
    merging = {"fine_tuning_job_id": plain["id"]}
    refused = ray_server.http.post("/v1/sqft/merge_adapter", json=merging, timeout=180)
    assert refused.status_code == 422
    assert "has integer weights" in refused.json()["detail"]
    refused = ray_server.http.post("/v1/sqft/merge_adapter", json={**merging, "openvino": True})
    assert refused.json()["error"]["param"] == "openvino"

    aware = {"quantization_aware": True, "group_size": 32, "lora_dropout": 0.1}
    trained = create(ray_server, "numbers.json", model=HALF, General={"lora_config": aware}, **SHORT)
    assert "lora_dropout is not used" in " ".join(job(ray_server, trained)["warnings"])
    succeeded(ray_server, trained)
    assert any("within the rounding to int4_asym" in message for message in messages(ray_server, trained))
    source = {"fine_tuning_job_id": trained, "adapter_version": "heuristic"}
    assert ray_server.http.post("/v1/sqft/extract_sub_adapter", json=source, timeout=180).status_code == 200
    answer = ray_server.http.post("/v1/sqft/merge_adapter", json={**source, "openvino": True}, timeout=180)
    assert answer.status_code == 200, answer.text
    merged = answer.json()
    assert merged["sparsity"]["after"] >= merged["sparsity"]["before"] > 0.49
    assert merged["warnings"] == []
    assert merged["bytes"]["after"] < merged["bytes"]["bf16"]
    ours = load_base_model(ModelSpec(name="merged", path=merged["path"]))
    before = load_file(ray_server.models_dir / HALF / "model.safetensors")
    for name, weight in ours.named_parameters():
        if name.endswith("proj.weight"):
            assert not weight[before[name] == 0].any()
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    compiled = ov.Core().compile_model(merged["openvino"]["path"], "CPU", exact)
    ids = tokens()
    with torch.no_grad():
        expected = ours(input_ids=ids).logits
    found = compiled({"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()})[0]
    assert torch.allclose(torch.from_numpy(found), expected, atol=2e-3)
    told = ray_server.http.get(f"/v1/models/{merged['fine_tuned_model']}").json()
    assert told["sparsity"]["total"] == merged["sparsity"]["after"]
