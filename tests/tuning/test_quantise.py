"""Integer weights: the grid's formulas against NNCF's, and models on disk."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from fixtures_elastic import logits, tokens
from fixtures_models import save_tiny_model
from fixtures_quantised import sparse_weight, sparsify, spec
from fixtures_training import write_records
from safetensors.torch import load_file, save_file

from comps.tuning.errors import ModelError, TuningError
from comps.tuning.models.load import load_base_model, load_tokenizer
from comps.tuning.quantised.files import MANIFEST
from comps.tuning.quantised.gptq import quantize_weight
from comps.tuning.quantised.grid import Grid, Steps
from comps.tuning.quantised.openvino import integer_constants
from comps.tuning.quantised.quantize import quantize
from comps.tuning.spec import CalibrationSpec, GridSpec, ModelSpec

GRIDS = [Grid(4, symmetric, size) for symmetric in (False, True) for size in (32, 64, None)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_steps_and_integers_are_those_of_nncf(grid: Grid):
    nncf = pytest.importorskip("nncf")
    from nncf.quantization.algorithms.weight_compression.config import WeightCompressionConfig
    from nncf.quantization.algorithms.weight_compression.parameters import CompressedWeight
    from nncf.quantization.algorithms.weight_compression.weight_lowering import compress_weight
    from nncf.tensor import Tensor as NncfTensor

    mode = nncf.CompressWeightsMode.INT4_SYM if grid.symmetric else nncf.CompressWeightsMode.INT4_ASYM
    config = WeightCompressionConfig(mode, grid.group_size or -1)
    weight = sparse_weight()
    steps = grid.fit(weight)
    theirs = compress_weight(NncfTensor(weight), (1,), config)
    some = weight.unflatten(1, (-1, grid.group_size or 256)).abs().amax(-1) > 0  # of zeros any scale is right
    scale = theirs.scale.data.reshape(steps.scale.shape)
    assert torch.equal(scale.half()[some], steps.scale.half()[some])

    shape = (*steps.scale.shape, 1) if grid.group_size else steps.scale.shape
    zero = None if steps.zero is None else NncfTensor(steps.zero.reshape(shape).to(torch.int32))
    given = CompressedWeight(None, NncfTensor(steps.scale.reshape(shape)), zero)
    theirs = compress_weight(NncfTensor(weight), (1,), config, given)
    assert torch.equal(theirs.tensor.data.reshape(weight.shape).to(torch.int16), steps.integers(weight))


@pytest.mark.parametrize("grid", [*GRIDS, Grid(8, False, None)], ids=str)
def test_zero_is_on_every_grid_and_values_are_within_half_a_step(grid: Grid):
    weight = sparse_weight()
    steps = grid.fit(weight)
    found = steps.nearest(weight)
    assert torch.equal(found[weight == 0], torch.zeros_like(found[weight == 0]))
    assert not found[weight == 0].signbit().any()
    error = (steps.grid.grouped(found - weight)).abs() / steps.scale.abs()[..., None]
    # Symmetric grids lack the opposite of their largest value; float16 cuts up to 15 * 2^-11 of a step.
    assert error.max() <= (1 if grid.symmetric else 0.5 + grid.high / 2**11)
    assert torch.equal(steps.nearest(found), found)
    assert steps.zeros(steps.integers(weight)) == int((found == 0).sum())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma2", "opt"])
def test_a_quantised_model_is_loaded_as_what_its_integers_stand_for(family, tmp_path):
    sparsify(save_tiny_model(tmp_path / "base", family))
    result = quantize(spec(tmp_path, grid=GridSpec(mode="int4_sym", group_size=32)))
    base = load_base_model(spec(tmp_path).base_model)
    model = load_base_model(ModelSpec(name="int4", path=str(tmp_path / "int4")))
    for (name, module), other in zip(base.named_modules(), model.modules(), strict=True):
        weight = getattr(module, "weight", None)
        if weight is None:
            continue
        expected, steps = weight.detach(), None
        if weight.ndim == 2 and any(part.isdigit() for part in name.split(".")):
            steps = Grid(4, True, 32)
        elif module in (base.get_input_embeddings(), base.get_output_embeddings()):
            steps = Grid(8, False, None)
        if steps:
            rows = expected.T if type(module).__name__ == "Conv1D" else expected
            rows = steps.fit(rows).nearest(rows)
            expected = rows.T if type(module).__name__ == "Conv1D" else rows
        assert torch.equal(other.weight, expected), name
    assert torch.isfinite(logits(model)).all()
    assert load_tokenizer(ModelSpec(name="int4", path=str(tmp_path / "int4"))).eos_token_id == 2
    manifest = json.loads((tmp_path / "int4" / MANIFEST).read_text())
    assert 0.49 < result["sparsity_before"] <= result["sparsity"]["total"] < 0.7
    assert result["modules"] == len(manifest["modules"])


def test_the_file_is_as_small_as_four_bits_and_their_scales(tmp_path):
    save_tiny_model(tmp_path / "base", hidden_size=128, intermediate_size=512, num_hidden_layers=2)
    result = quantize(spec(tmp_path, grid=GridSpec(group_size=64, embeddings="as_is")))
    linear = sum(
        tensor.numel()
        for name, tensor in load_file(tmp_path / "base" / "model.safetensors").items()
        if tensor.ndim == 2 and ".layers." in name
    )
    others = result["bytes"]["bf16"] // 2 - linear
    expected = linear * (4 + (16 + 8) / 64) / 8 + 4 * others
    assert result["bytes"]["after"] == pytest.approx(expected, rel=0.02)


def test_a_group_that_does_not_divide_the_inputs_is_a_sentence(tmp_path):
    save_tiny_model(tmp_path / "base")
    with pytest.raises(
        ModelError, match=r"group_size 64 does not divide the 32 inputs of .*q_proj.*; 32 does"
    ):
        quantize(spec(tmp_path, grid=GridSpec(group_size=64)))
    assert not (tmp_path / "int4").exists()


def test_a_quantised_model_is_not_quantised_again(tmp_path):
    save_tiny_model(tmp_path / "base")
    quantize(spec(tmp_path))
    again = ModelSpec(name="int4", path=str(tmp_path / "int4"))
    with pytest.raises(ModelError, match=r"is quantised \(integer_grid\)"):
        quantize(spec(tmp_path, base_model=again, output=tmp_path / "twice"))


def test_steps_survive_the_files(tmp_path):
    from comps.tuning.quantised.files import decode, encode

    for grid in GRIDS:
        steps = grid.fit(sparse_weight())
        tensors = encode("m", steps, steps.integers(sparse_weight()))
        read, integers = decode(grid, tensors["m.qweight"], tensors["m.scale"], tensors.get("m.zero"))
        assert isinstance(read, Steps)
        assert torch.equal(integers, steps.integers(sparse_weight()))
        assert torch.equal(read.values(integers), steps.nearest(sparse_weight()))


def test_gptq_errs_less_and_keeps_the_mask():
    """On correlated inputs the product's error falls; what was 0 is 0."""
    generator = torch.Generator().manual_seed(7)
    mixing = torch.randn(256, 256, generator=generator) / 16
    x = torch.randn(512, 256, generator=generator) @ mixing + torch.randn(512, 1, generator=generator)
    for sparse in (False, True):
        weight = torch.randn(96, 256, generator=generator) * 0.05
        if sparse:
            weight[torch.rand(weight.shape, generator=generator) < 0.5] = 0
        before = weight.clone()
        for grid in (Grid(4, False, 64), Grid(4, True, 32), Grid(4, False, None)):
            steps, integers = quantize_weight(weight, x.T @ x, grid)
            found = steps.values(integers)
            assert torch.equal(weight, before)
            assert not found[weight == 0].any()
            errors = [
                float((x @ (each - weight).T).norm()) for each in (found, grid.fit(weight).nearest(weight))
            ]
            assert errors[0] < 0.9 * errors[1]
            read = steps.integers(found)
            assert torch.equal(read, integers)


def test_a_model_is_quantised_layer_by_layer_on_calibration_data(tmp_path):
    sparsify(save_tiny_model(tmp_path / "base"))
    data = write_records(tmp_path / "records.json")
    rounded = quantize(spec(tmp_path, output=tmp_path / "nearest"))
    result = quantize(spec(tmp_path, method="gptq", calibration=CalibrationSpec(file=data, samples=16)))
    assert result["sparsity"]["total"] >= result["sparsity_before"] > 0.49
    assert result["bytes"] == rounded["bytes"]
    told = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [each["data"]["step"] for each in told if each["type"] == "progress"] == [1, 2]
    errors = []
    base = logits(load_base_model(spec(tmp_path).base_model))
    for name in ("int4", "nearest"):
        model = load_base_model(ModelSpec(name=name, path=str(tmp_path / name)))
        errors.append(float((logits(model) - base).norm()))
    assert errors[0] != errors[1]
    (tmp_path / "stop").touch()
    stopped = spec(tmp_path, method="gptq", calibration=CalibrationSpec(file=data), output=tmp_path / "none")
    assert quantize(stopped) is None
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("mode", ["int4_asym", "int4_sym"])
def test_the_openvino_model_computes_what_torch_computes(mode, tmp_path):
    ov = pytest.importorskip("openvino")
    sparsify(save_tiny_model(tmp_path / "base", "llama" if mode == "int4_asym" else "gpt2"))
    result = quantize(spec(tmp_path, grid=GridSpec(mode=mode, group_size=32), openvino=True))
    xml = Path(result["openvino"]["path"])
    assert xml == tmp_path / "int4" / "openvino" / "openvino_model.xml"
    # The integers are there as such, and as many stand for 0 as on our side.
    found = list(integer_constants(xml))
    assert sum(zeros for *_, zeros in found) == result["sparsity"]["zeros"]
    assert sum(integers.numel() for _, integers, _ in found) == result["sparsity"]["weights"]
    model = load_base_model(ModelSpec(name="int4", path=str(tmp_path / "int4")))
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    compiled = ov.Core().compile_model(xml, "CPU", exact)
    for rows, length, padding in ((2, 12, slice(8, None)), (3, 31, slice(27, None)), (2, 12, slice(0, 5))):
        ids = tokens(rows, length)
        mask = torch.ones_like(ids)
        mask[0, padding] = 0
        with torch.no_grad():
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            expected = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        inputs = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        logits_there = torch.from_numpy(compiled(inputs)[0])
        assert torch.allclose(logits_there[mask == 1], expected[mask == 1], atol=2e-3)
        alone = model(input_ids=ids[:1, mask[0] == 1]).logits.detach()
        assert torch.allclose(logits_there[:1, mask[0] == 1], alone, atol=2e-3)


@pytest.mark.parametrize("method", ["nearest", "gptq"])
def test_weights_that_are_not_finite_are_a_sentence(method, tmp_path):
    base, data = save_tiny_model(tmp_path / "base"), write_records(tmp_path / "data.json")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.self_attn.o_proj.weight"][0, 0] = torch.nan
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    grid = GridSpec(group_size=32)
    with pytest.raises(ModelError, match="not finite"):
        quantize(spec(tmp_path, grid=grid, method=method, calibration=CalibrationSpec(file=data)))
    assert not (tmp_path / "int4").exists()


def test_small_weights_stay_on_the_grid():
    weight = sparse_weight() * 1e-3
    found = Grid(4, False, 64).fit(weight).nearest(weight)
    assert float((found - weight).norm() / weight.norm()) < 0.1


def test_without_openvino_the_sentence_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(TuningError, match=r"needs the openvino package.*pip install .*\[int4\]"):
        quantize(spec(tmp_path, openvino=True))
