"""The four ways to fine-tune a sparse model, each from the dense model to what is used in the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures_elastic import logits, lora
from fixtures_models import save_tiny_model
from fixtures_training import Run, run, train_spec, write_records
from torch import Tensor

from comps.tuning.elastic.model import load_adapter
from comps.tuning.export.extract import extract
from comps.tuning.export.merge import merge
from comps.tuning.models.load import load_base_model
from comps.tuning.quantised.quantize import quantize
from comps.tuning.sparse.prune import prune
from comps.tuning.sparse.report import sparsity_of_directory
from comps.tuning.spec import (
    CalibrationSpec,
    ExtractSpec,
    GridSpec,
    LoraSpec,
    MergeSpec,
    ModelSpec,
    PruneSpec,
    QuantizeSpec,
)

GRID = GridSpec(group_size=32)


def model_spec(directory: Path) -> ModelSpec:
    return ModelSpec(name=directory.name, path=str(directory))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``dense``, a model; ``sparse``, half of it pruned with Wanda; ``int4``, that in INT4;
    ``records.json``."""
    directory = tmp_path_factory.mktemp("pipelines")
    save_tiny_model(directory / "dense")
    data = write_records(directory / "records.json")
    prune(
        PruneSpec(
            job_id="prune-1", directory=directory, name="sparse", base_model=model_spec(directory / "dense"),
            sparsity=0.5, calibration=CalibrationSpec(file=data, samples=16), output=directory / "sparse",
        )
    )  # fmt: skip
    quantize(
        QuantizeSpec(
            job_id="quantize-1", directory=directory, name="int4", grid=GRID,
            base_model=model_spec(directory / "sparse"), output=directory / "int4",
        )
    )  # fmt: skip
    return directory


def trained(made: Path, base: str, directory: Path, adapter: LoraSpec) -> Run:
    done = run(train_spec(directory / "job", made / base, made / "records.json", adapter=adapter))
    assert done.losses[-1] < done.losses[0]
    extract(
        ExtractSpec(
            job_id="extract-1", directory=directory, super_adapter=done.output, version="heuristic",
            output=done.output / "heuristic",
        )
    )  # fmt: skip
    return done


def adapted(made: Path, base: str, adapter: Path) -> Tensor:
    return logits(load_adapter(load_base_model(model_spec(made / base)), adapter))


def merged(made: Path, base: str, adapter: Path) -> Path:
    merge(
        MergeSpec(
            job_id="merge-1", directory=adapter, adapter=adapter, base_model=model_spec(made / base),
            output=adapter / "merged_model",
        )
    )  # fmt: skip
    return adapter / "merged_model"


@pytest.mark.parametrize("base", ["sparse", "int4"])
def test_an_adapter_stays_beside_its_sparse_base(base, made, tmp_path):
    """The first and the third: the base as it is, and the adapter unmerged."""
    before = sparsity_of_directory(made / base)
    done = trained(made, base, tmp_path, lora())
    plain = logits(load_base_model(model_spec(made / base)))
    whole, part = (adapted(made, base, path) for path in (done.output, done.output / "heuristic"))
    assert min(float((a - b).abs().max()) for a, b in ((whole, plain), (part, plain), (whole, part))) > 1e-3
    assert sparsity_of_directory(made / base) == before
    assert before.total >= 0.5


@pytest.mark.parametrize(
    ("adapter", "tolerance"), [(lora(sparse=True), 1e-5), (lora(sparse=True, grid=GRID), 1e-5)],
    ids=["SparsePEFT", "QA-SparsePEFT"],
)  # fmt: skip
def test_an_adapter_is_merged_into_one_model_as_sparse_as_its_base(adapter, tolerance, made, tmp_path):
    """The second and the fourth: in floating point, and in INT4."""
    done = trained(made, "sparse", tmp_path, adapter)
    for path in (done.output, done.output / "heuristic"):
        expected = adapted(made, "sparse", path)
        output = merged(made, "sparse", path)
        model = load_base_model(model_spec(output))
        assert torch.allclose(logits(model), expected, atol=tolerance)
        report = sparsity_of_directory(output)
        assert report.total >= sparsity_of_directory(made / "sparse").total
        base = dict(load_base_model(model_spec(made / "sparse")).named_parameters())
        for name, weight in model.named_parameters():
            if name.endswith("proj.weight"):
                assert not weight[base[name] == 0].any()
    assert (output / "quantization.json").is_file() == bool(adapter.grid)
