"""A base model that cannot be trained is refused in one sentence when the job is asked for: no worker starts.

The services here have no Ray at all. Models on the hub are in ``test_catalog`` and ``test_outgoing``.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from fixtures_models import save_tiny_model
from fixtures_service import create, upload, wait
from service_process import ServiceProcess

JOBS = "/v1/fine_tuning/jobs"
ROW = b'{"instruction": "Say yes.", "output": "yes"}\n'
AUTO_MAP = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
BY_OPERATOR = "needs code of its own, which only the operator can allow (FINETUNING_TRUST_REMOTE_CODE_MODELS)"


def edit(directory: Path, **changes: Any) -> None:
    """Change a model's config.json; ``None`` takes a key out."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def cut(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def pickled(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "of an unknown type": (
        lambda d: edit(d, model_type="unheard-of"),
        "is of the type 'unheard-of', which is no",
    ),
    "no causal language model": (
        lambda d: edit(d, model_type="t5"),
        "is of the type 't5', which is no causal",
    ),
    "for images": (
        lambda d: edit(d, model_type="vit"),
        "is of the type 'vit', which is no causal language model",
    ),
    "without a type": (lambda d: edit(d, model_type=None), "has a config.json without a model_type"),
    "with a type that is none": (
        lambda d: edit(d, model_type=["llama"]),
        "has a config.json without a model_type",
    ),
    "with a long type": (lambda d: edit(d, model_type="x" * 5000), "is of the type 'xxxx"),
    "with code of its own": (lambda d: edit(d, model_type="own", auto_map=AUTO_MAP), BY_OPERATOR),
    "truncated": (cut, "has a truncated weights file, model.safetensors"),
    "empty weights": (lambda d: (d / "model.safetensors").write_bytes(b""), "has a damaged weights file"),
    "pickled": (pickled, "has no safetensors weights; pickled weights are never loaded"),
    "without a config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "a damaged config": (
        lambda d: (d / "config.json").write_text("{"),
        "has a config.json that is not valid",
    ),
    "a deep config": (
        lambda d: (d / "config.json").write_text("[" * 100_000),
        "has a config.json that is not",
    ),
    "without a tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "has no tokenizer"),
    "an empty directory": (lambda d: [path.unlink() for path in d.iterdir()], "has no config.json"),
}


def ask(service: ServiceProcess, model: str) -> httpx.Response:
    file = service.openai.files.create(file=("rows.jsonl", ROW * 3), purpose="fine-tune")
    return service.http.post(JOBS, json={"model": model, "training_file": file.id})


@pytest.mark.parametrize(("spoil", "sentence"), SPOILT.values(), ids=SPOILT)
def test_a_model_that_cannot_be_trained_is_refused_at_once(
    server: ServiceProcess, tmp_path: Path, spoil: Callable[[Path], object], sentence: str
) -> None:
    name = f"unusable/{tmp_path.name}"
    spoil(save_tiny_model(server.models_dir / name))
    answer = ask(server, name)
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_model", "model")
    assert error["message"].startswith(f"The base model in {tmp_path.name!r} {sentence}")
    assert error["message"].endswith(".")
    assert len(error["message"]) < 300


def test_a_dense_model_gets_no_sparse_adapter(server: ServiceProcess) -> None:
    save_tiny_model(server.models_dir / "org" / "dense")
    job_id = create(
        server, upload(server), model="org/dense", General={"lora_config": {"sparse_adapter": True}}
    )
    error = wait(server, job_id)["error"]
    assert (error["code"], error["param"]) == ("invalid_model", "General.lora_config.sparse_adapter")
    assert "org/dense is not sparse: 0.00% of the weights" in error["message"]


def test_a_missing_model_is_404_and_says_where_it_was_looked_for(server: ServiceProcess) -> None:
    answer = ask(server, "nobody/nothing")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert "HF_HUB_OFFLINE is set" in answer.json()["detail"]


def test_a_client_cannot_allow_the_code_of_a_model(server: ServiceProcess) -> None:
    save_tiny_model(server.models_dir / "unusable" / "fine")
    for value in (True, "true", 1, "yes", [], {"": 1}):
        general = {"config": {"trust_remote_code": value}}
        body = {"model": "unusable/fine", "training_file": "x", "General": general}
        answer = server.http.post(JOBS, json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (
            422,
            "General.config.trust_remote_code",
        )
        assert "only the operator can allow the code that comes with a model" in answer.json()["detail"]


@pytest.fixture(scope="module")
def trusting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """A service that lets two models run their own code, of which one is there."""
    allowed = {"FINETUNING_TRUST_REMOTE_CODE_MODELS": "org/own, org/hub"}
    with closing(ServiceProcess(tmp_path_factory.mktemp("trusting"), **allowed)) as service:
        for name in ("org/own", "org/other"):
            edit(save_tiny_model(service.models_dir / name), model_type="own", auto_map=AUTO_MAP)
        save_tiny_model(service.models_dir / "org" / "plain")
        yield service


def trusted(service: ServiceProcess, job_id: str) -> bool:
    """What the run of a job is told about the code of its model."""
    with closing(sqlite3.connect(service.data_dir / "finetuning.db")) as database:
        (spec,) = database.execute("SELECT spec FROM jobs WHERE id = ?", (job_id,)).fetchone()
    return bool(json.loads(spec)["base_model"]["trust_remote_code"])


def test_the_operator_can_allow_a_named_model_and_no_other(trusting: ServiceProcess) -> None:
    made = ask(trusting, "org/own")
    assert made.status_code == 200, made.text
    assert trusted(trusting, made.json()["id"])
    assert BY_OPERATOR in ask(trusting, "org/other").json()["detail"]
    plain = ask(trusting, "org/plain")
    assert not trusted(trusting, plain.json()["id"])


def test_a_model_is_not_allowed_by_being_registered_under_an_allowed_name(trusting: ServiceProcess) -> None:
    def register(name: str, path: str) -> None:
        answer = trusting.http.post("/v1/models", json={"id": name, "path": path})
        assert answer.status_code == 200, answer.text

    register("org/hub", "org/other")
    assert BY_OPERATOR in ask(trusting, "org/hub").json()["detail"]
    register("mine", "org/own")
    made = ask(trusting, "mine")
    assert made.status_code == 200, made.text
    assert trusted(trusting, made.json()["id"])
