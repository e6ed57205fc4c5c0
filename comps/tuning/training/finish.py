"""The files of a finished job: a stock PEFT adapter, its search space, its tokenizer, its manifest."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import peft
from transformers import PreTrainedTokenizerBase

from comps.tuning import rundir
from comps.tuning.elastic.elastic_config import write_elastic_config
from comps.tuning.elastic.nncf_config import write_nncf_config
from comps.tuning.elastic.space import SearchSpace
from comps.tuning.export.files import GRID_NOTE, README, SPARSE_NOTE
from comps.tuning.search import learned
from comps.tuning.spec import TrainSpec
from comps.tuning.training import facts
from comps.tuning.training.statistics import Statistics

MANIFEST = "training_manifest.json"


def write_output(
    spec: TrainSpec,
    model: peft.PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    space: SearchSpace | None,
    statistics: Statistics | None,
    result: dict[str, Any],
) -> None:
    """Write the adapter into the run's output directory; the manifest comes last and lists the rest."""
    staged, output = spec.directory / rundir.SCRATCH / "final", spec.directory / rundir.OUTPUT
    # Whoever loads the adapter elsewhere knows the base model by its name, not by our path.
    model.peft_config["default"].base_model_name_or_path = spec.base_model.name
    # (Without save_embedding_layers=False PEFT would look that name up on the hub.)
    model.save_pretrained(staged, save_embedding_layers=False)
    (staged / README).unlink(missing_ok=True)  # PEFT's model card consists of placeholders
    if spec.lora.grid or spec.lora.sparse:
        note = GRID_NOTE if spec.lora.grid else SPARSE_NOTE
        (staged / README).write_text(note, encoding="utf-8")
    tokenizer.save_pretrained(staged)
    if space is not None:
        write_nncf_config(
            staged, model, space, epochs=spec.training.epochs, learning_rate=spec.training.learning_rate
        )
        write_elastic_config(staged, space)
        if statistics is not None:
            statistics.write(staged)
            learned.write(staged, space)
    files = {}
    for path in sorted(staged.iterdir()):
        rundir.fsync_path(path)
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
        os.replace(path, output / path.name)
    manifest = {
        "job_id": spec.job_id,
        "base_model": spec.base_model.name,
        "result": {key: value for key, value in result.items() if key != "path"},
        "lora": spec.lora.model_dump(mode="json"),
        "training": spec.training.model_dump(mode="json"),
        "versions": facts.versions(),
        "files": files,
    }
    rundir.write_json(output / MANIFEST, manifest)
