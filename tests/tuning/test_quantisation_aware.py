"""Training within the rounding: against an independent formula, against NNCF, from job to merged model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fixtures_elastic import logits, lora, randomise
from fixtures_models import save_tiny_model, tiny_model
from fixtures_quantised import sparse_weight, sparsify, spec
from fixtures_training import Run, run, train_spec, write_records
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from comps.tuning.elastic.model import ElasticController, build_adapter
from comps.tuning.errors import AdapterError, ModelError
from comps.tuning.export.extract import extract
from comps.tuning.export.merge import merge
from comps.tuning.models.load import load_base_model
from comps.tuning.quantised.aware import GridRounding
from comps.tuning.quantised.files import MANIFEST
from comps.tuning.quantised.grid import Grid, Steps
from comps.tuning.quantised.quantize import quantize
from comps.tuning.spec import ExtractSpec, GridSpec, LoraSpec, MergeSpec, ModelSpec

ASYM, SYM = GridSpec(mode="int4_asym", group_size=32), GridSpec(mode="int4_sym", group_size=32)
GRIDS = [Grid(4, symmetric, 64) for symmetric in (False, True)]


def adapter(inputs: int, outputs: int, rank: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, inputs, generator=generator) * 0.1
    return down.requires_grad_(), (torch.randn(outputs, rank, generator=generator) * 0.1).requires_grad_()


def formula(x: Tensor, down: Tensor, up: Tensor, weight: Tensor, steps: Steps, scale: float) -> Tensor:
    """``x FQ(W + s B A M)^T`` with torch's operations one by one; the rounding's derivative is 1 within the
    grid and 0 beyond."""
    summed = (weight + scale * (up @ down) * (weight != 0)).unflatten(1, (-1, 64))
    zero = 0 if steps.zero is None else steps.zero[..., None]
    places = torch.round(summed / steps.scale[..., None] + zero)
    low, high = (-8, 7) if steps.zero is None else (0, 15)
    within = (places >= low) & (places <= high)
    rounded = (places.clamp(low, high) - zero) * steps.scale[..., None]
    straight = rounded.detach() + (summed - summed.detach()) * within
    return x @ straight.flatten(1).T


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_output_and_gradients_are_those_of_the_formula(grid, transposed):
    weight = sparse_weight()
    steps = grid.fit(weight)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 7, 256, generator=generator).requires_grad_()
    wanted = torch.randn(2, 7, 96, generator=generator)
    down, up = adapter(256, 96)
    expected = formula(x, down, up, weight, steps, 0.5)
    gradients = torch.autograd.grad(expected, (x, down, up), wanted)
    rounding = GridRounding(steps, transposed)
    own = weight.T.contiguous() if transposed else weight
    found = rounding.product(x, down, up, own, None, 0.5)
    assert torch.allclose(found, expected, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(found, (x, down, up), wanted), gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
    merged = rounding.merged(down, up, own, 0.5)
    assert torch.allclose(x @ (merged if transposed else merged.T), expected, atol=1e-5)
    assert not merged[own == 0].any()
    # The adapter moves a good part of the weights to other places, some to the ends of the grid.
    assert (steps.integers(merged.T if transposed else merged) != steps.integers(weight)).float().mean() > 0.1


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_rounding_is_that_of_nncfs_quantiser_with_our_mask(grid):
    pytest.importorskip("nncf")
    from nncf.torch.quantization.layers import PTLoraNLSSpec, PTQuantizerSpec

    from patches.nncf import _CLASSES

    weight = sparse_weight(512, 576)
    steps = grid.fit(weight)
    down, up = (each.bfloat16().float() for each in adapter(576, 512, rank=8))
    (masked,) = (each for each in _CLASSES.values() if ("Symmetric" in each.__name__) == grid.symmetric)
    shape = (512, 9, 64)
    quantiser = masked(
        PTQuantizerSpec(4, None, True, False, False, (512, 9, 1), False),
        PTLoraNLSSpec(8, 8, [512, 576], shape),
    )
    with torch.no_grad():
        quantiser.lora_A.data, quantiser.lora_B.data = down.bfloat16(), up.bfloat16()
        if grid.symmetric:
            quantiser.scale.data.copy_(8 * steps.scale[..., None])
        else:
            quantiser.input_low.data.copy_((-steps.zero * steps.scale)[..., None])
            quantiser.input_range.data.copy_(15 * steps.scale[..., None])
    for rank in (8, 3):
        quantiser.set_active_rank(rank)
        with torch.no_grad():
            theirs = quantiser.quantize(weight)
            summed = quantiser._masked(weight)  # NNCF's factors are bfloat16, and so is their product
        places = grid.grouped(summed) / steps.scale[..., None]
        tie = ((places - places.floor()) - 0.5).abs() < 1e-5  # where float32 cannot tell which is nearer
        apart = (grid.grouped(theirs - steps.nearest(summed)) / steps.scale[..., None]).abs() > 1e-3
        assert tie.sum() < 20
        assert not (apart & ~tie).any()  # the same point of the grid for each of 294,912 weights
        assert not theirs[weight == 0].any()
        product = up.bfloat16()[:, :rank] @ down.bfloat16()[:rank]
        assert torch.equal(summed, weight + product * (weight != 0))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_records(tmp_path / "records.json")


def merged(job: Path, adapter: Path, base: Path, **more: object) -> dict[str, object]:
    return merge(
        MergeSpec(
            job_id="merge-1",
            directory=job,
            adapter=adapter,
            base_model=ModelSpec(name="org/tiny", path=str(base)),
            output=adapter / "merged_model",
            **more,
        )
    )


def masked_zeros(base: Path, model: Path) -> float:
    """The fraction of zeros of the base's linear weights, each of which is zero in the model, too."""
    zeros = count = 0
    ours = load_base_model(ModelSpec(name="base", path=str(base)))
    theirs = dict(load_base_model(ModelSpec(name="int4", path=str(model))).named_modules())
    for name, module in ours.named_modules():
        if name.endswith("_proj"):
            zero = module.weight == 0
            assert not theirs[name].weight[zero].any()
            zeros, count = zeros + int(zero.sum()), count + zero.numel()
    return zeros / count


@pytest.mark.parametrize("grid", [ASYM, SYM], ids=lambda grid: grid.mode)
def test_a_job_ends_in_one_int4_model_as_sparse_as_its_base(grid, tmp_path, data):
    base = sparsify(save_tiny_model(tmp_path / "base"))
    done = run(train_spec(tmp_path / "job", base, data, adapter=lora(grid=grid), epochs=2))
    assert done.losses[-1] < done.losses[0] - 0.1
    extract(
        ExtractSpec(
            job_id="extract-1", directory=tmp_path, super_adapter=done.output, version="heuristic",
            output=done.output / "heuristic",
        )
    )  # fmt: skip
    for version in (done.output, done.output / "heuristic"):
        result = merged(tmp_path, version, base)
        # What the merged model computes is what was trained, sub-adapter or whole.
        trained, controller = trained_model(done, base, lora(grid=grid))
        if version != done.output:
            controller.set(controller.space.heuristic)
        model = load_base_model(ModelSpec(name="int4", path=str(version / "merged_model")))
        assert torch.allclose(logits(model), logits(trained), atol=1e-5)
        assert 0.49 < masked_zeros(base, version / "merged_model") <= result["sparsity"]["after"]
        assert len(result["sparsity"]["layers"]) == 14
        assert (version / "README.md").read_text().startswith("# A quantisation-aware adapter")
        manifest = json.loads((version / "merged_model" / MANIFEST).read_text())
        assert sorted(facts["bits"] for facts in manifest["modules"].values()) == [4] * 14 + [8] * 2


def test_autocast_leaves_the_rounding_as_it_is():
    weight = sparse_weight()
    rounding = GridRounding(GRIDS[0].fit(weight))
    down, up = adapter(256, 96)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(5)).requires_grad_()
    merged = rounding.merged(down, up, weight, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        found = rounding.product(x, down, up, weight, None, 0.5)
    assert torch.equal(found, x.bfloat16() @ merged.bfloat16().T)
    found.sum().backward()
    for each in (x, down, up):
        assert each.grad is not None
        assert each.grad.dtype == torch.float32
    exact = torch.autograd.grad(rounding.product(x, down, up, weight, None, 0.5).sum(), (x, down, up))
    for each, full in zip((x, down, up), exact, strict=True):
        assert float((each.grad - full).norm() / full.norm()) < 0.01


def trained_model(done: Run, base: Path, adapter: LoraSpec) -> tuple[PeftModel, ElasticController]:
    model, _, controller = build_adapter(load_base_model(ModelSpec(name="b", path=str(base))), adapter)
    assert not set_peft_model_state_dict(model, done.weights).unexpected_keys
    assert controller is not None
    return model.eval(), controller


def test_a_quantised_base_keeps_its_own_grid(tmp_path, data):
    """The fourth pipeline on an INT4 base: zeros of the base, its scales, another set of integers."""
    sparsify(save_tiny_model(tmp_path / "base"))
    int4 = tmp_path / "int4"
    quantize(spec(tmp_path, grid=ASYM))
    done = run(train_spec(tmp_path / "job", int4, data, adapter=lora(grid=ASYM), learning_rate=3e-2))
    merged(tmp_path, done.output, int4)
    before = load_file(int4 / "model.safetensors")
    after = load_file(done.output / "merged_model" / "model.safetensors")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed
    assert all(name.endswith(".qweight") for name in changed)
    assert masked_zeros(int4, done.output / "merged_model") > 0.49
    with pytest.raises(ModelError, match="quantised to int4_asym with group_size 32, not to int4_sym"):
        run(train_spec(tmp_path / "other", int4, data, adapter=lora(grid=SYM)))


def test_gpt2_whose_weights_lie_the_other_way(tmp_path, data):
    base = sparsify(save_tiny_model(tmp_path / "base", "gpt2"))
    done = run(train_spec(tmp_path / "job", base, data, adapter=lora("gpt2", grid=SYM)))
    merged(tmp_path, done.output, base)
    trained, _ = trained_model(done, base, lora("gpt2", grid=SYM))
    model = load_base_model(ModelSpec(name="int4", path=str(done.output / "merged_model")))
    assert torch.allclose(logits(model), logits(trained), atol=1e-5)


def test_peft_merges_and_unmerges_within_the_rounding():
    model, _, controller = build_adapter(tiny_model(), lora(grid=ASYM))
    randomise(model)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    controller.set(controller.space.minimal)
    expected = logits(model.eval())
    for safe in (True, False):
        model.merge_adapter(safe_merge=safe)
        assert torch.allclose(logits(model), expected, atol=1e-5)
        model.unmerge_adapter()
        assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_an_adapter_outside_of_the_layers_is_refused():
    with pytest.raises(AdapterError, match="'lm_head' is not a linear module of a decoder layer"):
        build_adapter(tiny_model(), LoraSpec(dropout=0, target_modules=("lm_head",), grid=ASYM))
    with pytest.raises(ValueError, match="no dropout"):
        LoraSpec(dropout=0.1, grid=ASYM)
