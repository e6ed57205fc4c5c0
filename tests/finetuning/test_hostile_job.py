"""A job on a real Ray with a shell's words wherever words may be: in paths, names, metadata, environment.

Ray runs a job's entry point with a shell, so what is in that line must be quoted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fixtures_models import save_tiny_model
from fixtures_service import (
    MODEL,
    at_step,
    create,
    directory_of,
    events,
    local_head,
    output_of,
    succeeded,
    trainers,
    upload,
)
from hostile import shell_lines
from service_process import ROOT, ServiceProcess

from comps.tuning import sealed

# The data directory is part of that line. A name has no slash, so the canary is where the job happens to be.
DIRECTORY = 'it\'s a "place"; touch canary $(touch canary) `touch canary` & | touch canary #'
LONG = [{"instruction": "word " * 300, "output": f"number {n}"} for n in range(3)]
SHORT = [{"instruction": "Say the number.", "input": str(n), "output": f"number {n}"} for n in range(8)]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    directory = tmp_path_factory.mktemp("hostile") / DIRECTORY
    save_tiny_model(directory / "data" / "models" / MODEL)
    with closing(ServiceProcess(directory, ray=True, HF_TOKEN="hf_operator")) as service:
        yield service


def canaries(service: ServiceProcess) -> list[Path]:
    """What a shell has made of any of it, wherever it was started."""
    here = [ROOT, Path.cwd(), Path.home(), Path("/tmp")]
    found = [directory / "canary" for directory in here if (directory / "canary").exists()]
    for tree in (service.data_dir.parents[1], local_head(service).private_dir):
        found += tree.rglob("canary")
    return found


def test_a_job_full_of_shell_runs_to_its_end_and_none_of_it_is_run(
    service: ServiceProcess, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    lines = [line for line in shell_lines(canary) if "$" not in line and line.isprintable()]
    hostile = "".join(lines)
    name = f"{lines[0]} $(touch {canary}) `touch {canary}`.json".replace("/", "\\")
    changes: dict[str, Any] = {
        "metadata": {f"key {n}": line for n, line in enumerate(shell_lines(canary))},
        "suffix": "s.u-f_f",
        "integrations": [
            {"type": "wandb", "wandb": {"project": lines[1], "entity": lines[2][:200], "tags": lines}}
        ],
        "General": {
            "report_to": "none",
            "config": {"token": lines[0]},
            "output_dir": hostile,
            "gpt_base_model": hostile,
        },
        "Dataset": {"train_file": hostile},
        "Training": {"max_train_steps": 8, "deepspeed_config_file": hostile},
    }
    job_id = create(service, upload(service, SHORT + LONG, name), **changes)
    at_step(service, job_id, 1)
    (trainer,) = trainers(local_head(service), job_id)
    environment = trainer.environ()
    command = trainer.cmdline()

    answer = succeeded(service, job_id)
    assert answer["fine_tuned_model"] == f"ft:{MODEL}:s.u-f_f:{job_id}"
    assert canaries(service) == []

    # An argument list with the path as it is, and the environment word by word.
    assert command[1:] == ["-m", "comps.tuning", "--ray", str(directory_of(service, job_id) / "spec.json")]
    assert environment["WANDB_PROJECT"] == lines[1]
    assert environment["WANDB_ENTITY"] == lines[2]
    assert environment["WANDB_TAGS"] == ",".join(lines)
    assert sealed.unseal(environment[sealed.SEALED], Path(environment[sealed.KEY_FILE])) == lines[0]

    # The records that are longer than max_length are counted and said, in the job's own events.
    warnings = [event["message"] for event in events(service, job_id) if event["level"] == "warn"]
    shown = name.replace("\\", "/").rpartition("/")[2]
    assert (
        f"{shown}: 3 records were longer than max_length=512 or max_source_length=384 and cut" in warnings
    ), warnings

    extracted = service.http.post("/v1/finetune/extract_adapter", json={"fine_tuning_job_id": job_id})
    assert extracted.status_code == 200, extracted.text
    merged = service.http.post("/v1/finetune/merge_adapter", json={"fine_tuning_job_id": job_id})
    assert merged.status_code == 200, merged.text
    assert Path(merged.json()["path"]) == output_of(service, job_id) / "merged_model"
    assert canaries(service) == []
    assert os.listdir(tmp_path) == []
