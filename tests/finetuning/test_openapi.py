"""The routes that there are, and the schema that describes them, which changes only on purpose.

After a change that was meant, look at what this writes and commit it::

    python -m tests.finetuning.test_openapi
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from comps.finetuning.app import create_app
from comps.finetuning.settings import Settings

SNAPSHOT = Path(__file__).with_name("openapi.json")

# The wire contract of this version: OPEA's and SQFT's routes, then OpenAI's. A route that is added here
# stays: clients rely on it.
ROUTES = """
POST   /v1/files
POST   /v1/fine_tuning/jobs
GET    /v1/fine_tuning/jobs
POST   /v1/fine_tuning/jobs/retrieve
POST   /v1/fine_tuning/jobs/cancel
POST   /v1/finetune/list_checkpoints
POST   /v1/finetune/extract_adapter
POST   /v1/finetune/extract_sub_adapter
POST   /v1/sqft/extract_sub_adapter
POST   /v1/finetune/merge_adapter
POST   /v1/ffinetune/merge_adapter
POST   /v1/sqft/merge_adapter
POST   /v1/sqft/jobs
POST   /v1/finetune/search
GET    /v1/finetune/search
GET    /v1/finetune/search/{search_id}
DELETE /v1/finetune/search/{search_id}
POST   /v1/finetune/search/{search_id}/cancel
GET    /v1/finetune/search/{search_id}/files/{name}
GET    /v1/health_check
GET    /health
GET    /v1/statistics
GET    /metrics

GET    /v1/files
GET    /v1/files/{file_id}
DELETE /v1/files/{file_id}
GET    /v1/files/{file_id}/content
POST   /v1/uploads
GET    /v1/uploads/{upload_id}
POST   /v1/uploads/{upload_id}/parts
POST   /v1/uploads/{upload_id}/complete
POST   /v1/uploads/{upload_id}/cancel
GET    /v1/fine_tuning/jobs/{fine_tuning_job_id}
DELETE /v1/fine_tuning/jobs/{fine_tuning_job_id}
POST   /v1/fine_tuning/jobs/{fine_tuning_job_id}/pause
POST   /v1/fine_tuning/jobs/{fine_tuning_job_id}/resume
POST   /v1/fine_tuning/jobs/{fine_tuning_job_id}/cancel
GET    /v1/fine_tuning/jobs/{fine_tuning_job_id}/events
GET    /v1/fine_tuning/jobs/{fine_tuning_job_id}/checkpoints
GET    /v1/fine_tuning/jobs/{fine_tuning_job_id}/logs
POST   /v1/sqft/prune
POST   /v1/sqft/quantize
POST   /v1/evaluations
GET    /v1/evaluations
GET    /v1/evaluations/{evaluation_id}
GET    /v1/evaluations/{evaluation_id}/items
POST   /v1/evaluations/{evaluation_id}/cancel
DELETE /v1/evaluations/{evaluation_id}
GET    /v1/models
POST   /v1/models
GET    /v1/models/{model_id}
DELETE /v1/models/{model_id}
"""


def schema(directory: Path) -> dict[str, Any]:
    """The schema that ``/openapi.json`` answers, without the version, which each release changes."""
    found = create_app(Settings(data_dir=directory)).openapi()
    found["info"]["version"] = "*"
    return found


def test_the_routes_are_those_of_the_contract(tmp_path: Path) -> None:
    paths = schema(tmp_path)["paths"].items()
    found = {f"{method.upper():6} {path}" for path, methods in paths for method in methods}
    assert found == {line for line in ROUTES.splitlines() if line}


def test_the_schema_is_the_one_on_record(tmp_path: Path) -> None:
    record = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    found = schema(tmp_path)
    for part in ("paths", "components"):
        assert found[part] == record[part]
    assert found == record


def write() -> None:
    with tempfile.TemporaryDirectory() as directory:
        text = json.dumps(schema(Path(directory)), indent=1, ensure_ascii=False)
    SNAPSHOT.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    write()
