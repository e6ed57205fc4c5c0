"""A model with integer weights as an OpenVINO model: token ids and an attention mask in, logits out.

The integers become OpenVINO constants of 4 and 8 bits, with the multiplication that turns them into numbers
behind each, which OpenVINO's CPU plugin folds into its matrix products. No cache of keys and values is kept:
each call computes whole rows.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from comps.tuning.errors import NO_OPENVINO, ModelError, TuningError
from comps.tuning.models.load import load_base_model
from comps.tuning.quantised.files import Reader
from comps.tuning.quantised.grid import Steps
from comps.tuning.quantised.load import find_quantised
from comps.tuning.spec import ModelSpec

if TYPE_CHECKING:
    import openvino

DIRECTORY = "openvino"
XML = "openvino_model.xml"
# What OpenVINO puts before the name of a parameter of :class:`_Logits`' model.
_PREFIX = "self.model."


def require() -> Any:
    """The openvino package. Raises :class:`TuningError` with the command that installs it."""
    try:
        import openvino
    except ImportError as error:
        raise TuningError(NO_OPENVINO, param="openvino") from error
    return openvino


def write_openvino(directory: Path) -> Path:
    """Write the quantised model in ``directory`` to its subdirectory ``openvino``; returns the XML's path.

    Raises:
        TuningError: the openvino package is not installed.
        ModelError: OpenVINO cannot convert the architecture.
    """
    ov = require()
    spec = ModelSpec(name=directory.name, path=str(directory))
    reader = Reader(find_quantised(spec))
    model = load_base_model(spec)
    converted = _convert(ov, model)
    constants = {
        node.get_friendly_name(): node for node in converted.get_ops() if node.get_type_name() == "Constant"
    }
    for module in reader.modules:
        name = _live_name(f"{module}.weight", model)
        constant = constants.get(_PREFIX + name)
        if constant is None:
            raise ModelError(f"OpenVINO's form of this architecture has no weight {name}")
        steps, integers = reader.read(module)
        replacement = _decompressed(ov, steps, integers, _PREFIX + name)
        for place in list(constant.output(0).get_target_inputs()):
            place.replace_source_output(replacement.output(0))
    target = directory / DIRECTORY
    target.mkdir()
    # Half precision for what is still in floating point, as the base model mostly has it on disk.
    ov.save_model(converted, target / XML, compress_to_fp16=True)
    return target / XML


class _Logits(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        more: dict[str, Any] = {}
        if self._takes_positions:  # else padding on the left would count
            more["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        logits: Tensor = self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **more
        ).logits
        return logits


def _convert(ov: Any, model: PreTrainedModel) -> openvino.Model:
    ids = torch.ones(2, 8, dtype=torch.long)
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    try:
        _use_linears(model)
        # There PyTorch's fused attention makes NaN of a token that may see nothing, as in left padding.
        model.set_attn_implementation("eager")
        # Tracing warns of each comparison of shapes that it takes for a constant; the result is compared.
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            converted = ov.convert_model(_Logits(model), example_input=example)
            converted.output(0).get_tensor().set_names({"logits"})
            return converted
    except Exception as error:  # whatever OpenVINO does with an architecture that it does not know
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"OpenVINO cannot convert a model of type {model.config.model_type}: {reason}"
        ) from error


def _use_linears(model: PreTrainedModel) -> None:
    """GPT-2's layers keep their weights as [in, out], integers lie as [out, in]."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            inputs, outputs = module.weight.shape
            linear = nn.Linear(inputs, outputs, device="meta")
            linear.weight, linear.bias = nn.Parameter(module.weight.T.contiguous()), module.bias
            model.set_submodule(name, linear.eval())


def _live_name(name: str, model: PreTrainedModel) -> str:
    """The model's name for a tensor of its checkpoint, which may lack the first component or have more."""
    for live, _ in model.named_parameters(remove_duplicate=False):
        if live == name or live.endswith(f".{name}") or name.endswith(f".{live}"):
            return str(live)
    return name


def _decompressed(ov: Any, steps: Steps, integers: Tensor, name: str) -> openvino.Node:
    """``(q - z) * scale`` in float32 of constants in their own types."""
    ops, grid = ov.opset13, steps.grid
    grouped = grid.grouped(integers) if grid.group_size else integers
    per_group = [*steps.scale.shape, 1] if grid.group_size else list(steps.scale.shape)
    if grid.symmetric:
        kind = ov.Type.i4 if grid.bits == 4 else ov.Type.i8
    else:
        kind = ov.Type.u4 if grid.bits == 4 else ov.Type.u8
    weight = _constant(ov, grouped, kind)
    weight.set_friendly_name(name)
    value = ops.convert(weight, ov.Type.f32)
    if steps.zero is not None:
        zero = _constant(ov, steps.zero.reshape(per_group).to(torch.int16), kind)
        value = ops.subtract(value, ops.convert(zero, ov.Type.f32))
    scale = ops.constant(steps.scale.reshape(per_group).numpy(), dtype=ov.Type.f16)
    value = ops.multiply(value, ops.convert(scale, ov.Type.f32))
    if grid.group_size:
        value = ops.reshape(value, ops.constant(np.array(list(integers.shape))), special_zero=False)
    return value


def _constant(ov: Any, integers: Tensor, kind: Any) -> openvino.Node:
    """A constant of whole numbers; of 4 bits two lie in a byte, the first in the low half."""
    values = integers.reshape(-1).to(torch.int16)
    if kind in (ov.Type.u4, ov.Type.i4):
        if len(values) % 2:
            values = torch.cat([values, values.new_zeros(1)])
        nibbles = values & 15
        packed = (nibbles[::2] | (nibbles[1::2] << 4)).to(torch.uint8).numpy()
    else:
        packed = (values & 255).to(torch.uint8).numpy()
    tensor = ov.Tensor(kind, list(integers.shape))
    tensor.data.reshape(-1).view(np.uint8)[:] = packed
    return ov.op.Constant(tensor)


def integer_constants(xml: Path) -> Iterator[tuple[str, Tensor, int]]:
    """The 4-bit weights of an OpenVINO model on disk: name, integers [out, groups, group size] (symmetric
    ones from -8), and how many of them stand for 0.0."""
    ov = require()
    for node in ov.Core().read_model(xml).get_ops():
        kind = node.get_output_element_type(0)
        if node.get_type_name() != "Constant" or kind not in (ov.Type.u4, ov.Type.i4):
            continue
        (use,) = node.output(0).get_target_inputs()
        (then,) = use.get_node().output(0).get_target_inputs()
        integers = _unpacked(ov, node)
        if then.get_node().get_type_name() == "Subtract":
            if then.get_index() == 1:
                continue  # a zero point
            zero = then.get_node().input_value(1).get_node().input_value(0).get_node()
            zeros = int((integers == _unpacked(ov, zero)).sum())
        else:
            zeros = int((integers == 0).sum())
        yield node.get_friendly_name(), integers, zeros


def _unpacked(ov: Any, constant: Any) -> Tensor:
    shape = list(constant.get_output_shape(0))
    packed = torch.from_numpy(np.array(constant.get_data()).reshape(-1).view(np.uint8).copy()).to(torch.int16)
    values = torch.stack([packed & 15, packed >> 4], -1).flatten()[: int(np.prod(shape))]
    if constant.get_output_element_type(0) == ov.Type.i4:
        values = torch.where(values > 7, values - 16, values)
    return values.reshape(shape)
