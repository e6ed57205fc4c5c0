"""Models over HTTP: what lies in the models root, what is registered, what jobs made."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import openai
import pytest
from fixtures_jobs import start_and_finish
from safetensors.numpy import save_file

from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import CheckpointRow, JobRow, ModelRow, new_id

WEIGHTS = {"model.layers.0.self_attn.q_proj.weight": numpy.zeros((4, 4), dtype="float32")}
ADAPTER = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "base_model_name_or_path": "org/base"}
LORA = "base_model.model.model.layers.0.self_attn.q_proj"
LORA_WEIGHTS = {
    f"{LORA}.lora_A.weight": numpy.zeros((8, 4), dtype="float32"),
    f"{LORA}.lora_B.weight": numpy.zeros((4, 8), dtype="float32"),
}


def write(directory: Path, files: dict[str, Any]) -> Path:
    """A directory with these files: tensors for ``.safetensors``, text as it is, and the rest as JSON."""
    directory.mkdir(parents=True)
    for name, content in files.items():
        if isinstance(content, str):
            (directory / name).write_text(content)
        elif name.endswith(".safetensors"):
            save_file(content, directory / name)
        else:
            (directory / name).write_text(json.dumps(content))
    return directory


BASE = {"config.json": {"model_type": "llama"}, "model.safetensors": WEIGHTS}
SUPER = {
    "adapter_config.json": ADAPTER,
    "adapter_model.safetensors": LORA_WEIGHTS,
    "elastic_adapter_config.json": [{"target": [f"{LORA}.lora_A"], "search_space": [8, 4]}],
}
NODE = "P/" + "/".join(f"M[{part}]" for part in f"{LORA}.lora_A.default".split("."))
WIDTH = {"overwrite_groups": [[NODE]], "overwrite_groups_widths": [[8, 4]]}
SPACES: dict[str, Any] = {
    "elastic_adapter_config.json": SUPER["elastic_adapter_config.json"],
    "nncf_config.json": {"SQFT": {"training": {"elasticity": {"width": WIDTH}}}},
}


@pytest.fixture
def root(server, tmp_path: Path) -> Path:
    """A directory of the test's own under the models root of the shared service."""
    directory = server.models_dir / tmp_path.name
    directory.mkdir()
    return directory


@pytest.fixture
def database(server) -> Iterator[Database]:
    database = Database(f"sqlite:///{server.data_dir}/finetuning.db")
    yield database
    database.dispose()


def register(server, directory: Path, **fields: Any) -> tuple[int, dict[str, Any]]:
    """Status and body of a registration of ``directory``, under its own last name unless told otherwise."""
    path = directory.relative_to(server.models_dir).as_posix()
    answer = server.http.post("/v1/models", json={"id": f"id-{path}", "path": path, **fields})
    return answer.status_code, answer.json()


def test_base_models_in_the_models_root_are_listed_unasked(server, client: openai.OpenAI, root: Path) -> None:
    write(root / "base", BASE)
    name = f"{root.name}/base"
    assert name in [model.id for model in client.models.list()]
    model = client.models.retrieve(name)
    assert (model.id, model.object, model.owned_by) == (name, "model", "local")
    assert model.created > 0
    assert model.model_extra["path"] == str(root / "base")
    with pytest.raises(openai.ConflictError, match="not the service's to remove"):
        client.models.delete(name)


def test_a_base_model_without_a_tokenizer_can_be_registered_and_forgotten(
    server, client: openai.OpenAI, root: Path
) -> None:
    directory = write(root / "deep" / "down", BASE)
    status, body = register(server, directory, id="my-base", pathh=1)
    assert (status, body["id"], body["kind"], body["path"]) == (200, "my-base", "base", str(directory))
    assert body["warnings"] == ["pathh is not a known key and was ignored; did you mean path?"]
    assert client.models.retrieve("my-base").id == "my-base"
    assert register(server, directory, id="my-base")[0] == 409
    assert client.models.delete("my-base").deleted
    assert (directory / "config.json").exists()
    with pytest.raises(openai.NotFoundError, match="There is no model 'my-base'"):
        client.models.retrieve("my-base")


@pytest.mark.parametrize("space", SPACES)
def test_a_super_adapter_trained_elsewhere_can_be_registered(server, root: Path, space: str) -> None:
    files = {name: SUPER[name] for name in list(SUPER)[:2]}
    directory = write(root / "adapter", {**files, space: SPACES[space]})
    status, body = register(server, directory)
    assert status == 200, body
    assert (body["kind"], body["base_model"]) == ("super_adapter", "org/base")


def test_a_given_base_model_must_be_known(server, root: Path) -> None:
    write(root / "base", BASE)
    directory = write(root / "adapter", SUPER)
    status, body = register(server, directory, base_model="org/typo")
    assert (status, body["error"]["param"]) == (422, "base_model")
    assert "org/typo" in body["detail"]
    status, body = register(server, directory, base_model=f"{root.name}/base")
    assert (status, body["base_model"]) == (200, f"{root.name}/base")


@pytest.mark.parametrize("base", ["/home/them/model", "../model", None])
def test_an_adapter_whose_config_names_no_usable_base_model_needs_one_given(
    server, root: Path, base: str | None
) -> None:
    config = ADAPTER | {"base_model_name_or_path": base}
    status, body = register(server, write(root / "adapter", SUPER | {"adapter_config.json": config}))
    assert (status, body["error"]["param"]) == (422, "base_model")


def without(files: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in files.items() if key != name}


INDEX = "model.safetensors.index.json"
UNUSABLE: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "neither a config.json (a base model) nor an adapter_config.json"),
    "no weights": (without(BASE, "model.safetensors"), "has no safetensors weights"),
    "pickled weights": (
        without(BASE, "model.safetensors") | {"pytorch_model.bin": "x"}, "pickled weights are never loaded"
    ),
    "damaged config": (BASE | {"config.json": "{"}, "config.json that is not valid JSON"),
    "config no object": (BASE | {"config.json": []}, "config.json that is not an object"),
    "deep config": (BASE | {"config.json": "[" * 100_000}, "config.json that is not valid JSON"),
    "damaged weights": (BASE | {"model.safetensors": "x" * 99}, "damaged weights file"),
    "empty weights": (BASE | {"model.safetensors": ""}, "damaged weights file"),
    "a missing shard": (
        BASE | {INDEX: {"weight_map": {"a": "model-2.safetensors"}}}, "model-2.safetensors"
    ),
    "a damaged index": (BASE | {INDEX: [1]}, "damaged model.safetensors.index.json"),
    "no search space": (
        without(SUPER, "elastic_adapter_config.json"), "neither nncf_config.json nor elastic_adapter"
    ),
    "no adapter weights": (without(SUPER, "adapter_model.safetensors"), "has no adapter_model.safetensors"),
    "damaged adapter weights": (
        SUPER | {"adapter_model.safetensors": "x"}, "adapter_model.safetensors is damaged"
    ),
    "no LoRA weights": (SUPER | {"adapter_model.safetensors": WEIGHTS}, "which plain LoRA has not"),
    "damaged adapter config": (SUPER | {"adapter_config.json": "nul"}, "adapter_config.json is not JSON"),
    "deep adapter config": (SUPER | {"adapter_config.json": "[" * 100_000}, "adapter_config.json is not"),
    "another adapter": (SUPER | {"adapter_config.json": {"peft_type": "IA3"}}, "not describe a LoRA adapter"),
    "a damaged search space": (SUPER | {"nncf_config.json": "]"}, "nncf_config.json is not JSON"),
    "a search space of another model": (
        SUPER | {"elastic_adapter_config.json": [{"target": [f"{LORA}s.lora_A"], "search_space": [8]}]},
        "for which the adapter has no tensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("files", "message"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_an_unusable_directory_is_refused_with_what_is_wrong(
    server, root: Path, files: dict[str, Any], message: str
) -> None:
    status, body = register(server, write(root / "model", files))
    assert status == 422, body
    assert message in body["detail"]
    assert body["error"]["param"] == "path"
    assert server.http.get(f"/v1/models/id-{root.name}/model").status_code == 404


def test_weights_that_cannot_be_read_are_refused_with_the_reason(server, root: Path) -> None:
    directory = write(root / "model", without(BASE, "model.safetensors"))
    (directory / "model.safetensors").mkdir()
    status, body = register(server, directory)
    assert status == 422, body
    assert "has an unreadable weights file, model.safetensors: Is a directory." in body["detail"]


PATHS = [
    "/etc", "../data", "a/../../b", ".", "./", "..", "~", "a\\b", "a\0b", "no/such", "%2e%2e/x", "x" * 900,
    "http://example.org/model", "$(touch canary)",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_a_path_out_of_the_models_root_is_refused(server, path: str) -> None:
    answer = server.http.post("/v1/models", json={"id": "escape", "path": path})
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["param"] == "path"


def test_links_out_of_the_models_root_are_refused(server, root: Path, tmp_path: Path) -> None:
    outside = write(tmp_path / "outside", BASE)
    (root / "linked").symlink_to(outside)
    status, body = register(server, root / "linked")
    assert (status, body["error"]["param"]) == (422, "path")
    assert "leads out of the models root" in body["detail"]
    inside = write(root / "model", without(BASE, "model.safetensors"))
    (inside / "model.safetensors").symlink_to(outside / "model.safetensors")
    status, body = register(server, inside)
    assert status == 422
    assert "a link 'model.safetensors' that leads out" in body["detail"]
    (root / "circle").symlink_to(root / "circle")
    assert register(server, root / "circle")[0] == 422


@pytest.mark.parametrize("name", ["ft-job-1", "ft:x", "file-1", "../x", "a b", "/x", "", "x" * 201, "a//b"])
def test_a_name_that_cannot_be_a_model_s_is_refused(server, root: Path, name: str) -> None:
    write(root / "base", BASE)
    answer = server.http.post("/v1/models", json={"id": name, "path": f"{root.name}/base"})
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "id"


def test_a_name_cannot_hide_another_directory(server, root: Path) -> None:
    write(root / "one", BASE)
    status, body = register(server, write(root / "two", BASE), id=f"{root.name}/one")
    assert (status, body["error"]["param"]) == (409, "id")


def test_a_model_that_a_job_made_is_deleted_with_its_files(
    server, client: openai.OpenAI, database: Database
) -> None:
    output = write(server.data_dir / "jobs" / "ft-job-m" / "output", SUPER)
    version = write(output / "heuristic", SUPER)
    with database.session() as session:
        session.add(
            ModelRow(id="ft:m", kind="super_adapter", path=str(output), job_id="ft-job-m", details={})
        )
        session.add(ModelRow(id="ft:m:h", kind="adapter", path=str(version), job_id="ft-job-m", details={}))
        session.add(JobRow(id="ft-job-m", kind="fine_tuning", status="succeeded", model="m"))
        session.flush()
        checkpoint = {"job_id": "ft-job-m", "step": 1, "path": str(output / "checkpoint-1")}
        session.add(CheckpointRow(id="ftckpt-m", **checkpoint))
        spec = {"adapter": str(version)}
        session.add(JobRow(id="job-x", kind="merge", status="paused", model="m", spec=spec))
    assert client.models.retrieve("ft:m:h").model_extra["job_id"] == "ft-job-m"
    with pytest.raises(openai.ConflictError, match="used by the job job-x"):
        client.models.delete("ft:m:h")
    with database.session() as session:
        session.query(JobRow).filter_by(id="job-x").update({"status": "cancelled"})
    with pytest.raises(openai.ConflictError, match="'ft:m:h' was made of 'ft:m'"):
        client.models.delete("ft:m")
    assert client.models.delete("ft:m:h").deleted
    assert output.exists()
    assert not version.exists()
    assert [each.id for each in client.fine_tuning.jobs.checkpoints.list("ft-job-m")] == ["ftckpt-m"]
    assert client.models.delete("ft:m").deleted
    assert list((server.data_dir / "jobs").glob(".deleted-*")) == []
    assert not output.exists()
    assert client.fine_tuning.jobs.checkpoints.list("ft-job-m").data == []


def test_a_base_model_that_an_unfinished_job_uses_stays_registered(
    server, database: Database, root: Path
) -> None:
    directory = write(root / "base", BASE)
    register(server, directory, id="busy")
    spec = {"base_model": {"path": str(directory)}, "resume_from": None}
    with database.session() as session:
        session.add(JobRow(id="job-busy", kind="fine_tuning", status="paused", model="busy", spec=spec))
    answer = server.http.delete("/v1/models/busy")
    assert answer.status_code == 409
    assert "job-busy" in answer.json()["detail"]
    assert answer.headers["x-should-retry"] == "false"


def test_what_was_made_of_a_registered_super_adapter_is_deleted_with_its_files(
    server, client: openai.OpenAI, database: Database, root: Path
) -> None:
    """And the registration only after it: its name must not lead to what was made of another one."""
    name = f"super-{root.name}"
    assert register(server, write(root / "adapter", SUPER), id=name)[0] == 200
    heuristic = write(server.data_dir / "adapters" / name / "heuristic", SUPER)
    merged = write(heuristic / "merged_model", BASE)
    for kind, path in (("extract", heuristic), ("merge", merged)):
        job = JobRow(id=new_id(kind), kind=kind, status="queued", model="org/base", source=name)
        job.version = "heuristic"
        with database.session() as session:
            session.add(job)
        start_and_finish(database, job.id, {"outcome": "succeeded", "path": str(path)})
    for needed, by in ((name, f"{name}:heuristic"), (f"{name}:heuristic", f"{name}:heuristic:merged")):
        with pytest.raises(openai.ConflictError, match=f"'{by}.* was made of '{needed}'"):
            client.models.delete(needed)
    for gone, path in ((f"{name}:heuristic:merged", merged), (f"{name}:heuristic", heuristic)):
        assert client.models.delete(gone).deleted
        assert not path.exists()
    assert client.models.delete(name).deleted
    assert (root / "adapter" / "adapter_config.json").exists()


def test_registrations_survive_a_restart_and_are_listed_newest_first(make_server) -> None:
    service = make_server()
    os.utime(write(service.models_dir / "base", BASE), (1e9, 1e9))
    service.http.post("/v1/models", json={"id": "named", "path": "base"})
    before = service.http.get("/v1/models").json()
    assert [model["id"] for model in before["data"]] == ["named", "base"]
    service.kill()
    service.start()
    assert service.http.get("/v1/models").json() == before
