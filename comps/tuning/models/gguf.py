"""Turn a GGUF file into a base-model directory: ``python -m comps.tuning.models.gguf FILE DIRECTORY``.

The weights are dequantised and kept in float32 unless asked otherwise: half types do not hold the
dequantised values (for SmolLM2-135M in Q4_1 the logits move by 0.03 in float16 and 0.16 in bfloat16),
a float32 file is mapped into memory as it is, and a model merged from it loses nothing either.
"""

from __future__ import annotations

import argparse
import struct
import sys
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedTokenizerFast
from transformers.integrations.gguf import read_gguf_metadata

from comps.tuning.errors import ModelError, TuningError
from comps.tuning.rundir import new_directory

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def convert_gguf(gguf_file: Path, output_dir: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write ``gguf_file`` as safetensors with config and tokenizer to ``output_dir``, whole or not at all.

    Returns ``output_dir``. Raises :class:`ModelError` for a file that is no GGUF file or holds an
    architecture or tokenizer that transformers cannot read.
    """
    splitter = _pre_tokenizer(gguf_file)
    source = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
        )
    except (ValueError, KeyError, NotImplementedError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{gguf_file.name} cannot be converted: {reason}") from error
    if splitter == "smollm":
        # transformers reads this pre-tokenizer as GPT-2's, which keeps the digits of a number together;
        # SmolLM's merges were learnt with every digit on its own.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    tokenizer.model_max_length = model.config.max_position_embeddings
    with new_directory(output_dir) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return output_dir


def _pre_tokenizer(gguf_file: Path) -> str | None:
    """The name that llama.cpp gives the way in which this file's tokenizer splits text."""
    try:
        metadata, _ = read_gguf_metadata(str(gguf_file))
    except FileNotFoundError as error:
        raise ModelError(f"{gguf_file}: there is no such file") from error
    except (ValueError, OSError, struct.error) as error:
        raise ModelError(f"{gguf_file.name} is not a readable GGUF file: {error}") from error
    name: str | None = metadata.get("tokenizer.ggml.pre")
    return name


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m comps.tuning.models.gguf", description=convert_gguf.__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    options = parser.parse_args(arguments)
    try:
        print(convert_gguf(options.file, options.output_dir, DTYPES[options.dtype]))
    except TuningError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
