"""NNCF's own quantisation-aware NLS with our mask: zeros stay, gradients flow, no compiler is needed."""

from __future__ import annotations

import pytest
import torch
from fixtures_elastic import logits, tokens
from fixtures_models import save_tiny_model
from fixtures_quantised import sparsify

from comps.tuning.models.load import load_base_model
from comps.tuning.quantised.aware import GridRounding
from comps.tuning.quantised.grid import Grid
from comps.tuning.spec import ModelSpec

nncf = pytest.importorskip("nncf")

from nncf.torch.function_hook.wrapper import get_hook_storage  # noqa: E402
from nncf.torch.quantization import reference  # noqa: E402
from nncf.torch.quantization.layers import AsymmetricLoraNLSQuantizer  # noqa: E402

from patches.errors import PatchError  # noqa: E402
from patches.nncf import mask_quantisers  # noqa: E402

# NNCF traces the model, and takes comparisons of shapes for constants.
pytestmark = pytest.mark.filterwarnings("ignore:::nncf", "ignore:::torch", "ignore:::transformers")


def compressed(directory, mode):
    """A sparse model and the same one with NNCF's quantisers of rank 4, whose B is not small."""
    base = ModelSpec(name="base", path=str(sparsify(save_tiny_model(directory / "base"))))
    model = nncf.compress_weights(
        load_base_model(base),
        mode=mode,
        group_size=32,
        dataset=nncf.Dataset([{"input_ids": tokens()}]),
        compression_format=nncf.CompressionFormat.FQ_LORA_NLS,
        backup_mode=nncf.BackupMode.NONE,
        advanced_parameters=nncf.AdvancedCompressionParameters(lora_adapter_rank=4),
    )
    return load_base_model(base), model


def test_masked_quantisers_keep_what_nncfs_fill(tmp_path, monkeypatch):
    plain, model = compressed(tmp_path, nncf.CompressWeightsMode.INT4_ASYM)
    # Their own formula, uncompiled: else a C++ compiler would be needed here.
    monkeypatch.setattr(reference.torch_forward, "_compiled_func", reference.torch_executor.forward)
    weights = {name: weight.detach() for name, weight in plain.named_parameters()}
    hooks = [hook for _, hook in get_hook_storage(model).named_hooks() if hasattr(hook, "lora_B")]
    generator = torch.Generator().manual_seed(2)
    for hook in hooks:
        for factor in (hook.lora_A, hook.lora_B):
            factor.data = (torch.randn(factor.shape, generator=generator) * 0.1).bfloat16()
    masked = mask_quantisers(model)
    assert len(masked) == 14
    filled = kept = zeros = 0
    for name, hook in masked.items():
        weight = weights[name]
        with torch.no_grad():
            theirs = AsymmetricLoraNLSQuantizer.quantize(hook, weight)
            ours = hook.quantize(weight)
        zero = weight == 0
        zeros += int(zero.sum())
        filled += int(theirs[zero].count_nonzero())
        kept += int((ours[zero] == 0).sum())
    assert kept == zeros > 9_000
    assert filled > 0.2 * zeros  # when this fails, NNCF masks by itself and the patch can go

    # NNCF's grids are fitted to the same weights; its products are bfloat16, so some fall beside ours.
    for rank in (4, 2):
        same = count = 0
        for name, hook in masked.items():
            hook.set_active_rank(rank)
            weight, grid = weights[name], Grid(4, False, 32)
            steps = grid.fit(weight)
            with torch.no_grad():
                down, up = (each.float() for each in hook.get_active_adapters())
                ours = GridRounding(steps).merged(down, up, weight, 1.0)
                apart = grid.grouped(hook.quantize(weight) - ours).abs() / steps.scale[..., None]
            assert apart.max() < 1.02
            same, count = same + int((apart < 0.02).sum()), count + apart.numel()
        assert same > 0.97 * count
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("mode", ["INT4_ASYM", "INT4_SYM"])
def test_a_step_changes_adapters_and_scales_and_no_zero(mode, tmp_path):
    _, model = compressed(tmp_path, getattr(nncf.CompressWeightsMode, mode))
    masked = mask_quantisers(model)
    parameters = [p for hook in masked.values() for p in hook.get_trainable_params().values()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    ids = tokens()
    losses = []
    for step in range(4):
        for hook in masked.values():
            hook.set_active_rank((4, 2)[step % 2])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in parameters)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for name, hook in masked.items():
        weight = model.get_parameter(name)
        assert not hook.quantize(weight)[weight == 0].any()


def test_a_model_without_quantisers_is_refused():
    with pytest.raises(PatchError):
        mask_quantisers(torch.nn.Linear(2, 2))
