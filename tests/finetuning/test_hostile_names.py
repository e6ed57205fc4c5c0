"""Names that clients choose: none of them leads to a file that is not theirs, whichever field it comes in."""

from __future__ import annotations

import http.client
import json
import os
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fixtures_elastic import lora, super_adapter
from fixtures_jobs import succeeded_job
from fixtures_models import save_tiny_model, tiny_model
from hostile import SECRET, shell_lines, traversals, tree
from service_process import ROOT, ServiceProcess

from comps.finetuning.settings import Settings
from comps.finetuning.store.database import Database

ROW = b'{"instruction": "Say yes.", "output": "yes"}\n'
MODEL = "names/tiny"
JOBS = "/v1/fine_tuning/jobs"
IN_PATH = [
    ("GET", f"{JOBS}/{{}}"), ("GET", f"{JOBS}/{{}}/events"), ("GET", f"{JOBS}/{{}}/checkpoints"),
    ("GET", f"{JOBS}/{{}}/logs"), ("POST", f"{JOBS}/{{}}/cancel"), ("GET", "/v1/files/{}"),
    ("GET", "/v1/files/{}/content"), ("DELETE", "/v1/files/{}"), ("GET", "/v1/models/{}"),
    ("DELETE", "/v1/models/{}"), ("POST", "/v1/uploads/{}/parts"), ("POST", "/v1/uploads/{}/complete"),
    ("POST", "/v1/uploads/{}/cancel"), ("GET", "/v1/uploads/{}"),
]  # fmt: skip


class Place:
    """A shared service with something worth stealing beside its data directory and its models root."""

    def __init__(self, server: ServiceProcess, adapter: Path) -> None:
        self.server, self.http = server, server.http
        parent = server.data_dir.parent
        self.outside = parent / "outside"
        self.base = save_tiny_model(server.models_dir / MODEL)
        for root in (self.outside, parent / "data-evil", server.data_dir / "models-evil"):
            config = save_tiny_model(root / "secret", tokenizer=False) / "config.json"
            config.write_text(json.dumps(json.loads(config.read_text()) | {"note": SECRET}))
            (root / "config.json").write_text(config.read_text())
        self.link = server.models_dir / "link"
        self.link.symlink_to(self.outside)
        self.file_id = server.openai.files.create(file=("rows.jsonl", ROW * 3), purpose="fine-tune").id
        database = Database(Settings(data_dir=server.data_dir).database_url)
        self.job_id = succeeded_job(database, server.data_dir / "jobs", self.base, adapter)
        database.dispose()
        self.output = server.data_dir / "jobs" / self.job_id / "output"
        self.canary = parent / "canary"
        self.names = [*traversals(self.outside), *shell_lines(self.canary)]

    def everything(self) -> tuple[dict[str, str], set[str], set[str]]:
        """All that no name may change: what lies beside the data, and in the data what is not a file's."""
        data = self.server.data_dir
        within = [data / name for name in ("models", "models-evil", "jobs", "adapters")]
        # SQLite's journals come and go, and the first token makes the key.
        own = {name for name in os.listdir(data) if not name.startswith(("finetuning.db", "secrets.key"))}
        beside = set(os.listdir(data.parent)) | own, set(os.listdir(ROOT))
        return tree(self.outside, data.parent / "data-evil", *within), *beside

    def refused(self, method: str, path: str, body: Any = None) -> None:
        """The answer is a 4xx without the secret; the path goes out as it is, dots and all."""
        connection = http.client.HTTPConnection(self.server.url.removeprefix("http://"), timeout=60)
        content = json.dumps(body).encode() if body is not None else None
        connection.request(method, path, content)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        assert 400 <= answer.status < 500, (method, path, body, text)
        assert SECRET not in text, (method, path, body)
        assert json.loads(text)["error"]["message"], (method, path, body)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    adapter = tmp_path_factory.mktemp("adapter")
    super_adapter(tiny_model(), lora(), adapter)
    # A service of its own: files of other tests have hostile names, too, by which they may be found.
    with closing(ServiceProcess(tmp_path_factory.mktemp("service"))) as server:
        place = Place(server, adapter)
        yield place
        place.link.unlink()


@pytest.fixture(autouse=True)
def _nothing_else_changes(place: Place) -> Iterator[None]:
    before = place.everything()
    yield
    assert place.everything() == before
    assert not place.canary.exists()
    stored = {path.name for path in (place.server.data_dir / "files").iterdir()} - {"orphaned"}
    assert all(re.fullmatch(r"file-[0-9a-f-]{36}", name) for name in stored), stored


def test_in_the_path_of_a_request(place: Place) -> None:
    for name in place.names:
        encoded = {quote(name, safe=""), quote(quote(name, safe=""), safe="")}
        if name.isascii() and name.isprintable() and " " not in name:
            encoded.add(name)
        for method, path in IN_PATH:
            for each in encoded:
                place.refused(method, path.format(each))


def test_where_a_model_a_file_a_checkpoint_or_a_job_is_looked_up(place: Place) -> None:
    job = {"model": MODEL, "training_file": place.file_id}
    for name in place.names:
        for body in (
            {**job, "model": name}, {**job, "training_file": name}, {**job, "validation_file": name},
            {"training_file": place.file_id, "General": {"base_model": name}},
            {**job, "Dataset": {"validation_file": name}},
            {**job, "General": {"resume_from_checkpoint": name}},
        ):  # fmt: skip
            place.refused("POST", JOBS, body)
        for route in (f"{JOBS}/retrieve", f"{JOBS}/cancel", "/v1/finetune/list_checkpoints"):
            place.refused("POST", route, {"fine_tuning_job_id": name})
        for route in ("/v1/finetune/extract_adapter", "/v1/finetune/merge_adapter"):
            place.refused("POST", route, {"fine_tuning_job_id": name})
            place.refused("POST", route, {"model": name})
        for path in (JOBS, "/v1/files", f"{JOBS}/{place.job_id}/events"):
            place.refused("GET", f"{path}?after={quote(name, safe='')}")


def test_as_the_directory_of_a_model(place: Place) -> None:
    for name in place.names:
        place.refused("POST", "/v1/models", {"id": "names-registered", "path": name})
        body = {"id": "names-registered", "path": MODEL, "base_model": name}
        place.refused("POST", "/v1/models", body)


def test_as_the_id_of_a_model(place: Place) -> None:
    taken = []
    for name in place.names:
        answer = place.http.post("/v1/models", json={"id": name, "path": MODEL})
        assert answer.status_code in (200, 409, 422), (name, answer.text)
        if answer.status_code == 200:
            taken.append(name)
            assert place.http.delete(f"/v1/models/{name}").status_code == 200
    assert taken == ["CON"]


def test_as_a_version_s_name(place: Place) -> None:
    taken = []
    for name in place.names:
        body = {"fine_tuning_job_id": place.job_id, "adapter_version": name, "wait": False}
        place.refused("POST", "/v1/finetune/merge_adapter", body)
        body["custom_config"] = [8] * 6
        answer = place.http.post("/v1/finetune/extract_adapter", json=body)
        assert answer.status_code in (200, 422), (name, answer.text)
        if answer.status_code == 200:
            taken.append(name)
            assert Path(answer.json()["path"]) == place.output / name
    assert taken == ["link", "CON"]


def test_where_a_name_is_only_kept(place: Place) -> None:
    """A file's name, a suffix, metadata, what is ignored: kept as text or refused, and nothing else."""
    for name in place.names:
        upload = {"file": (name, ROW)}
        file = place.http.post("/v1/files", files=upload, data={"purpose": "fine-tune"})
        assert file.status_code == 200, (name, file.text)
        content = place.http.get(f"/v1/files/{file.json()['id']}/content")
        assert content.content == ROW
        assert "x-evil" not in content.headers
        body: dict[str, Any] = {
            "model": MODEL,
            "training_file": file.json()["id"],
            "metadata": {"key": name, name[:64]: "value"},
            "General": {"output_dir": name, "gpt_base_model": name},
            "Dataset": {"train_file": name},
            "Training": {"deepspeed_config_file": name},
        }
        made = place.http.post(JOBS, json=body)
        assert made.status_code == 200, (name, made.text)
        assert made.json()["metadata"]["key"] == name
        output = place.server.data_dir / "jobs" / made.json()["id"] / "output"
        assert made.json()["output_dir"] == str(output)
        assert place.http.post(f"{JOBS}/{made.json()['id']}/cancel").status_code == 200
        for more in (
            {"suffix": name}, {"General": {"config": {"token": name}}},
            {"integrations": [{"type": "wandb", "wandb": {"project": name, "entity": name, "tags": [name]}}]},
        ):  # fmt: skip
            answer = place.http.post(JOBS, json=body | more)
            assert answer.status_code in (200, 422), (name, answer.text)
            if answer.status_code == 200:
                assert place.http.post(f"{JOBS}/{answer.json()['id']}/cancel").status_code == 200


@pytest.mark.parametrize("value", ["$WANDB_API_KEY", "${HF_TOKEN}", "a\nb", "a\0b", "\x1b[2J"])
def test_what_ray_would_expand_or_a_terminal_obey_does_not_become_a_job_s_environment(
    place: Place, value: str
) -> None:
    wandb = {"type": "wandb", "wandb": {"project": "p"}}
    fields = {
        "integrations.0.wandb.project": {"integrations": [wandb | {"wandb": {"project": value}}]},
        "integrations.0.wandb.entity": {
            "integrations": [wandb | {"wandb": {"project": "p", "entity": value}}]
        },
        "integrations.0.wandb.tags.0": {
            "integrations": [wandb | {"wandb": {"project": "p", "tags": [value]}}]
        },
        "General.config.token": {"General": {"config": {"token": value}}},
    }
    for param, body in fields.items():
        sent = {"model": MODEL, "training_file": place.file_id, **body}
        answer = place.http.post(JOBS, json=sent)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)
        assert "'$', line ends and other control characters are not allowed here" in answer.json()["detail"]
