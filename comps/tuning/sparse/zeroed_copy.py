"""A copy of a model's files in which some weights are zero, and every other byte is as it was.

The files are copied as they are, then single tensors are rewritten in place; so it takes the memory of one
tensor, and names, types, shards and metadata stay.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from comps.tuning.errors import AdapterError, ModelError
from comps.tuning.export.base_files import CONFIG, GENERATION_CONFIG, INDEX, BaseFiles, find_tensor
from comps.tuning.export.files import TOKENIZER, copy_files
from comps.tuning.models.weights import WeightsError, read_headers
from comps.tuning.sparse.report import is_layer_linear

_STORED = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip


class ZeroedCopy:
    """The copy of ``base`` in ``directory``, which exists and is empty.

    Raises :class:`ModelError`, as all methods do, for files that cannot be read.
    """

    def __init__(self, base: BaseFiles, directory: Path) -> None:
        self._base, self._directory = base, directory
        try:
            headers = read_headers(base.directory / shard for shard in base.shards)
            self._headers = {header.name: header for header in headers}
        except WeightsError as error:
            raise ModelError(f"the base model {base.name} {error}") from error

    def copy(self, code: bool = False) -> None:
        """Copy all files; the model's Python files, too, if ``code``."""
        source = self._base.directory
        for shard in self._base.shards:
            shutil.copyfile(source / shard, self._directory / shard)
        copy_files(source, self._directory, [CONFIG, INDEX, GENERATION_CONFIG, *TOKENIZER])
        if code:
            copy_files(source, self._directory, [path.name for path in source.glob("*.py")])

    def dtype(self) -> torch.dtype:
        """The type that the linear weights of the layers are stored in; float32 where they are of several,
        so that the live model has all of them as the files do."""
        found = {
            header.dtype
            for header in self._headers.values()
            if len(header.shape) == 2 and is_layer_linear(header.name.removesuffix(".weight"))
        }
        return _STORED.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32

    def zero(self, module: str, weight: Tensor, keep: Tensor) -> None:
        """Zero the weights of ``module`` where ``keep`` is false, both in the orientation of the file.

        ``weight`` is what the live model has there. Raises :class:`ModelError` when the file has something
        else: then the two are not the same weights under the same name, and ``keep`` says nothing of it.
        """
        name = self._tensor(module)
        header = self._headers[name]
        shard = self._directory / header.file.name
        try:
            with safe_open(shard, framework="pt") as tensors:
                stored: Tensor = tensors.get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"the base model {self._base.name} cannot be read: {error}") from error
        if not stored.float().isfinite().all():
            raise ModelError(
                f"the base model {self._base.name} cannot be pruned: {module} has weights that are not finite"
            )
        if stored.shape != weight.shape or not torch.equal(stored.to(weight.dtype), weight.cpu()):
            raise ModelError(
                f"the base model {self._base.name} cannot be pruned: its file {header.file.name} does not "
                f"hold the weights of {module} as the model uses them"
            )
        pruned = stored.masked_fill(~keep.cpu(), 0).contiguous()
        with open(shard, "r+b") as stream:
            stream.seek(header.offset)
            stream.write(pruned.view(torch.uint8).numpy().data)

    def _tensor(self, module: str) -> str:
        try:
            name = find_tensor(f"{module}.weight", self._headers)
        except AdapterError as error:
            raise ModelError(f"the base model {self._base.name} cannot be pruned: {error.message}") from error
        if name is None or self._headers[name].dtype not in _STORED:
            how = f"as {self._headers[name].dtype}" if name else "under another name"
            raise ModelError(
                f"the base model {self._base.name} cannot be pruned: its files have the weights of {module} "
                f"{how}, not as floating-point numbers in a tensor of their own"
            )
        return name
