"""Requests that nobody thought of, made from the OpenAPI schema: never a 5xx, and answers as the schema says.

The schema is the one on record, which ``test_openapi`` compares with the service's. The examples are the same
at each run. What they cannot guess (a model, a file, a job, modules and ranks) is put in where there is a
place for it, or nearly all would end at the first look-up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from fixtures_elastic import lora, super_adapter
from fixtures_jobs import succeeded_job
from fixtures_models import save_tiny_model, tiny_model
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from service_process import ROOT, ServiceProcess

from comps.finetuning.settings import Settings
from comps.finetuning.store.database import Database

SNAPSHOT = ROOT / "tests" / "finetuning" / "openapi.json"
MODEL, FILE = "org/fuzz", "fuzz.jsonl"
NLS: dict[str, Any] = {
    "neural_lora_search": True,
    "target_module_groups": [["q_proj", "k_proj"], ["up_proj"]],
    "search_space": ["8,4", [8, 2]],
    "r": 8,
    "nls_target_modules": "q_proj,v_proj",
    "target_modules": ["down_proj"],
}
# Other names of routes that are tested by their first one.
ALIASES = [
    "/v1/sqft/jobs", "/v1/sqft/extract_sub_adapter", "/v1/finetune/extract_sub_adapter",
    "/v1/sqft/merge_adapter", "/v1/ffinetune/merge_adapter",
]  # fmt: skip
ROWS = b'{"instruction": "Say yes.", "output": "yes"}\n' * 20
CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance,
    response_schema_conformance,
]  # fmt: skip


class Known:
    """What there is in the service: the values that make a request more than a look-up."""

    def __init__(self, server: ServiceProcess, job_id: str) -> None:
        self.session = requests.Session()
        self.job_id = job_id
        self.file_id = server.openai.files.create(file=(FILE, ROWS), purpose="fine-tune").id
        self.made = 0

    def put_into(self, case: Any) -> None:
        """Every second request is about what there is."""
        self.made += 1
        if self.made % 2:
            return
        for name, value in (("fine_tuning_job_id", self.job_id), ("file_id", self.file_id)):
            if name in case.path_parameters and case.method == "GET":
                case.path_parameters[name] = value
        if isinstance(case.body, dict):
            values = {"model": MODEL, "training_file": FILE, "validation_file": FILE, "wait": False}
            values["fine_tuning_job_id"] = self.job_id
            for name in values.keys() & self.fields(case):
                if isinstance(case.body.get(name, ""), str | bool):
                    case.body[name] = values[name]
            self.elastic(case.body.get("General"))

    def elastic(self, general: Any) -> None:
        """Some of the fields of NLS, each time others."""
        if isinstance(general, dict) and isinstance(lora := general.get("lora_config"), dict):
            chosen = [name for bit, name in enumerate(NLS) if self.made >> (bit + 1) & 1]
            lora |= {name: NLS[name] for name in chosen}

    @staticmethod
    def fields(case: Any) -> set[str]:
        """The names of the fields of an operation's body."""
        raw = case.operation.schema.raw_schema
        content = raw["paths"][case.operation.path][case.operation.method]["requestBody"]["content"]
        reference = content.get("application/json", {}).get("schema", {}).get("$ref", "")
        return set(raw["components"]["schemas"].get(reference.rpartition("/")[2], {}).get("properties", {}))


@pytest.fixture(scope="module")
def known(server: ServiceProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Known]:
    base = save_tiny_model(server.models_dir / MODEL)
    adapter = tmp_path_factory.mktemp("adapter")
    super_adapter(tiny_model(), lora(), adapter)
    database = Database(Settings(data_dir=server.data_dir).database_url)
    job_id = succeeded_job(database, server.data_dir / "jobs", base, adapter)
    database.dispose()
    known = Known(server, job_id)
    yield known
    known.session.close()


schema = schemathesis.openapi.from_path(SNAPSHOT).exclude(path=ALIASES)


@schema.parametrize()
@settings(
    max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
def test_no_request_makes_the_service_fail_or_answer_what_its_schema_does_not_say(
    case: Any, known: Known, server: ServiceProcess
) -> None:
    known.put_into(case)
    case.call_and_validate(server.url, session=known.session, checks=CHECKS, timeout=30)
