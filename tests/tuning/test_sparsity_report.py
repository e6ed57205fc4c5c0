"""The fraction of exact zeros of a model, counted in its files and in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures_models import FAMILIES, save_tiny_model, tiny_model
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from comps.tuning.models.weights import WeightsError
from comps.tuning.sparse.report import sparsity_of_directory, sparsity_of_module


def with_zeros(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The model with a different share of zeros in each of its linear modules, embeddings and head too."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, Conv1D, torch.nn.Embedding)):
            share = torch.rand((), generator=generator)
            module.weight.data[torch.rand(module.weight.shape, generator=generator) < share] = 0
    return model


def expected(model: torch.nn.Module) -> dict[str, float]:
    """Zeros by module, straight from the classes of the modules."""
    return {
        name: float((module.weight == 0).double().mean())
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and any(p.isdigit() for p in name.split("."))
    }


def tail(name: str) -> str:
    """A module's path from the list of layers on: some files lack what comes before."""
    parts = name.split(".")
    return ".".join(parts[next(i for i, part in enumerate(parts) if part.isdigit()) :])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_files_and_memory_tell_the_zeros_of_each_linear_in_a_layer(family: str, tmp_path: Path) -> None:
    model = with_zeros(tiny_model(family))
    model.save_pretrained(tmp_path)
    wanted = expected(model)
    assert len(wanted) >= 8
    of_memory, of_files = sparsity_of_module(model), sparsity_of_directory(tmp_path)
    assert {name: zeros.fraction for name, zeros in of_memory.layers.items()} == wanted
    assert {tail(name): zeros for name, zeros in of_files.layers.items()} == {
        tail(name): zeros for name, zeros in of_memory.layers.items()
    }
    assert of_files.total == pytest.approx(of_memory.zeros / of_memory.weights)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_float_type_is_counted_and_both_zeros_count(dtype: torch.dtype, tmp_path: Path) -> None:
    weight = torch.tensor([[0.0, -0.0, 1.0], [-1.0, torch.finfo(dtype).tiny, float("nan")]], dtype=dtype)
    integers = torch.zeros(4, 4, dtype=torch.uint8)
    save_file(
        {"model.layers.0.a.weight": weight, "model.layers.0.b.weight": integers},
        tmp_path / "model.safetensors",
    )
    report = sparsity_of_directory(tmp_path)
    assert {name: (zeros.zeros, zeros.weights) for name, zeros in report.layers.items()} == {
        "model.layers.0.a": (2, 6)
    }


def test_large_tensors_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_zeros(tiny_model())
    model.save_pretrained(tmp_path)
    whole = sparsity_of_directory(tmp_path)
    monkeypatch.setattr("comps.tuning.sparse.report._PIECE", 100)
    assert sparsity_of_directory(tmp_path) == whole


def test_layers_come_in_their_order(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, num_hidden_layers=11)
    layers = [int(name.split(".")[2]) for name in sparsity_of_directory(tmp_path).facts()["layers"]]
    assert layers == sorted(layers)
    assert max(layers) == 10


def test_shards_are_those_of_the_index_and_others_beside_them_are_left_out(tmp_path: Path) -> None:
    model = with_zeros(tiny_model())
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    save_file({"layers.0.wq.weight": torch.zeros(64, 64)}, tmp_path / "consolidated.safetensors")
    assert sparsity_of_directory(tmp_path) == sparsity_of_module(model)


def test_a_model_without_linear_weights_to_count_has_none(tmp_path: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    report = sparsity_of_directory(tmp_path)
    assert report.weights == 0
    assert report.total == 0


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(WeightsError, match="truncated"):
        sparsity_of_directory(tmp_path)
