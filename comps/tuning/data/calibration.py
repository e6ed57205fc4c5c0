"""Rows of tokens to calibrate with: what a base model computes on them tells which of its weights matter."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from comps.tuning.data.records import Checked, Skipped, iter_checked
from comps.tuning.data.tokenise import instruction_rows, text_rows
from comps.tuning.spec import CalibrationSpec, DataSpec


@dataclass(frozen=True)
class CalibrationRows:
    """``rows`` of token ids, of different lengths; ``warnings`` are sentences for the run's events."""

    rows: list[list[int]]
    warnings: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))


def calibration_rows(
    spec: CalibrationSpec, tokenizer: PreTrainedTokenizerBase, longest: int | None = None
) -> CalibrationRows:
    """Draw ``spec.samples`` records, each as likely as any other, and make rows of them as training does:
    prompt, response and EOS. ``longest`` is the most tokens that the model takes, if that is known.

    The file is read once and never held whole. Fewer records than asked for are all used, with a warning.
    Raises :class:`DataError` and :class:`ModelError`.
    """
    name = spec.name or spec.file.name
    skipped = Skipped()
    records = iter_checked(
        spec.file, name, "calibration",
        skipped=skipped, limit=spec.max_record_bytes, max_records=spec.max_records,
    )  # fmt: skip
    # Algorithm R (Vitter 1985), with the places in the file kept, so that rows come in its order.
    generator = np.random.default_rng(spec.seed % 2**63)
    drawn: list[tuple[int, Checked]] = []
    for index, record in enumerate(records):
        if index < spec.samples:
            drawn.append((index, record))
        elif (place := int(generator.integers(index + 1))) < spec.samples:
            drawn[place] = (index, record)
    chosen = [record for _, record in sorted(drawn, key=lambda each: each[0])]

    length = min(spec.max_length, longest or spec.max_length)
    cut = DataSpec(train_file=spec.file, max_length=length, max_source_length=length, group=False)
    make_rows = text_rows if chosen[0].shape == "text" else instruction_rows
    rows = [row.ids for row in make_rows(chosen, tokenizer, cut)]
    warnings = list(skipped.warnings())
    if len(rows) < spec.samples:
        warnings.append(f"{name}: has {len(rows)} records to calibrate with, not {spec.samples}")
    return CalibrationRows(rows, warnings)
