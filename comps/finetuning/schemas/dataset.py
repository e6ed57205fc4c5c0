"""``Dataset``: how records become rows of tokens."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from comps.finetuning.schemas.tolerant import OTHER_TASK, Count, Integer, Number, Tolerant, unused


def _all_when_zero(value: object) -> object:
    return None if value == 0 and not isinstance(value, bool) else value


# OPEA's default of 0 means no limit.
Limit = Annotated[Count | None, BeforeValidator(_all_when_zero)]
_MAX_LENGTH = "max_length limits the whole row"


class DatasetBlock(Tolerant):
    """OPEA's block of the same name."""

    validation_file: str | None = Field(
        None, max_length=1024, description="As the request's `validation_file`, which may be given instead"
    )
    validation_split_percentage: Annotated[Number, Field(ge=0, lt=100)] = 5
    max_length: Annotated[Integer, Field(ge=2)] = 512
    max_source_length: Count = 384
    mask_input: bool = Field(True, description="No loss on the prompt")
    mask_response: bool = Field(
        True, description="With `mask_input` false and this given as true: no loss on the response"
    )
    padding_side: Literal["left", "right"] = "right"
    truncation_side: Literal["left", "right"] = "right"
    pad_to_max: bool = False
    group: bool = True
    block_size: Annotated[Integer, Field(ge=2)] = 512
    shuffle: bool = True
    max_train_samples: Limit = None
    max_eval_samples: Limit = None

    train_file: Any = unused(because="training_file names the data")
    data_preprocess_type: Any = unused("neural_chat", because="the records' fields decide the prompt")
    max_prompt_length: Any = unused(512, because=_MAX_LENGTH)
    max_seq_length: Any = unused(512, because=_MAX_LENGTH)
    truncation: Any = unused(True, because="rows longer than max_length are always truncated")
    padding: Any = unused(True, because="pad_to_max decides")
    train_group_size: Any = unused(8, because=OTHER_TASK)
    query_max_len: Any = unused(128, because=OTHER_TASK)
    passage_max_len: Any = unused(128, because=OTHER_TASK)
    query_instruction_for_retrieval: Any = unused(because=OTHER_TASK)
    passage_instruction_for_retrieval: Any = unused(because=OTHER_TASK)
    reasoning_dataset_keys: Any = unused(["Question", "Complex_CoT", "Response"], because=OTHER_TASK)
