"""The body of a job: what is accepted, what is warned about, what is refused and with which field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fixtures_documents import ACCEPTED, OPEA_OTHER_TASKS, SQFT_SPARSE
from pydantic import ValidationError

from comps.cores.errors import InvalidRequest
from comps.finetuning.jobs.hyperparameters import effective
from comps.finetuning.schemas.jobs import JobRequest
from comps.finetuning.schemas.lora import LoraConfig
from comps.finetuning.schemas.nls import lora_spec
from comps.finetuning.schemas.tolerant import MAX_WARNINGS, request_warnings
from comps.tuning.spec import GridSpec

LEAST: dict[str, Any] = {"training_file": "rows.json", "model": "org/base"}


def parse(**more: Any) -> JobRequest:
    return JobRequest.model_validate(LEAST | more)


def refused_fields(**more: Any) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        parse(**more)
    return [".".join(map(str, problem["loc"])) for problem in caught.value.errors()]


@pytest.mark.parametrize("body", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_the_documents_bodies_are_accepted_without_a_warning(body: dict[str, Any]) -> None:
    assert request_warnings(JobRequest.model_validate(body)) == []


@pytest.mark.parametrize("body", OPEA_OTHER_TASKS, ids=lambda body: body["General"]["task"])
def test_tasks_that_are_not_there_are_refused_with_those_that_are(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="'instruction_tuning' or 'pretraining'") as caught:
        JobRequest.model_validate(body)
    assert [problem["loc"] for problem in caught.value.errors()] == [("General", "task")]


def test_a_quantisation_aware_adapter_has_a_grid_and_no_dropout() -> None:
    asked = {"quantization_aware": True, "quantization_mode": "int4_sym", "group_size": "32"}
    for dropout, warnings in (({}, 0), ({"lora_dropout": 0.1}, 1)):
        config = parse(General={"lora_config": asked | dropout}).General.lora_config
        spec, told = lora_spec(config)
        assert spec.grid == GridSpec(mode="int4_sym", group_size=32)
        assert spec.dropout == 0
        assert len(told) == warnings
    plain = parse(General={"lora_config": {"group_size": 32}}).General.lora_config
    assert lora_spec(plain)[0].grid is None
    assert refused_fields(General={"lora_config": {"group_size": 48}}) == ["General.lora_config.group_size"]


@pytest.mark.parametrize(("dropout", "warnings"), [(0, 0), (0.1, 1)])
def test_a_sparse_adapter_is_trained_and_what_dropout_costs_it_is_told(dropout: float, warnings: int) -> None:
    config = JobRequest.model_validate(SQFT_SPARSE).General.lora_config
    assert config is not None
    spec, told = lora_spec(config.model_copy(update={"lora_dropout": dropout}))
    assert spec.sparse
    assert [each for each in told if "five products" in each] == told
    assert len(told) == warnings


def test_defaults_are_those_of_the_contract() -> None:
    request = parse()
    lora, data, training = request.General.lora_config, request.Dataset, request.Training
    assert lora is not None
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.neural_lora_search) == (8, 32, 0.1, False)
    assert (data.max_length, data.max_source_length, data.validation_split_percentage) == (512, 384, 5)
    assert (data.mask_input, data.mask_response) == (True, True)
    assert (training.epochs, training.batch_size, training.learning_rate) == (1, 2, 5e-5)
    assert (training.lr_scheduler, training.weight_decay, training.optimizer) == ("linear", 0, "adamw_torch")
    assert (training.gradient_accumulation_steps, training.logging_steps, training.device) == (1, 10, "cpu")


def test_null_stands_for_the_default() -> None:
    everything: dict[str, Any] = {"General": {}, "Dataset": {}, "Training": {"resources_per_worker": {}}}
    for name, block in everything.items():
        fields = type(getattr(parse(), name)).model_fields
        everything[name] = dict.fromkeys(fields) | block
    nested = {"lora_config": dict.fromkeys(LoraConfig.model_fields), "config": {"token": None}}
    everything["General"].update(nested)
    rest = dict.fromkeys(JobRequest.model_fields.keys() - LEAST.keys())
    request = parse(**(rest | everything))
    assert request.model_dump() == parse().model_dump()
    assert request_warnings(request) == []
    assert parse(**dict.fromkeys(everything)).model_dump() == parse().model_dump()
    assert parse(General={"lora_config": None}).General.lora_config is None
    with pytest.raises(ValidationError, match=r"training_file\n.*required"):
        parse(training_file=None)


def test_unknown_keys_are_named_with_their_path_and_the_key_that_was_meant() -> None:
    request = parse(
        surprise=1,
        General={"lora_config": {"target_module_group": [["q_proj"]], "zzz": 0}},
        Training={"learning_rates": 1},
        integrations=[{"type": "wandb", "wandb": {"project": "p", "colour": "red"}}],
    )
    warnings = request_warnings(request)
    assert warnings[0] == "surprise is not a known key and was ignored."
    assert any("did you mean General.lora_config.target_module_groups?" in warning for warning in warnings)
    assert any(warning.startswith("General.lora_config.zzz is not") for warning in warnings)
    assert any("did you mean Training.learning_rate?" in warning for warning in warnings)
    assert any(warning.startswith("integrations.0.wandb.colour is not") for warning in warnings)
    assert len(warnings) == 5


def test_thousands_of_unknown_keys_make_a_bounded_number_of_warnings() -> None:
    warnings = request_warnings(parse(**{f"learning_{n}": n for n in range(5000)}))
    assert len(warnings) == MAX_WARNINGS
    assert warnings[-1] == "4951 more keys were ignored."


def test_fields_that_are_known_and_not_acted_on_are_warned_about_unless_they_say_the_default() -> None:
    request = parse(
        General={"tokenizer_name": "other", "gpt_base_model": False},
        Dataset={"max_seq_length": 1024, "truncation": True},
        Training={"dpo_beta": 0.5, "hpu_execution_mode": "lazy", "resources_per_worker": {"HPU": 1}},
    )
    named = [warning.split(" is not used")[0] for warning in request_warnings(request)]
    assert sorted(named) == [
        "Dataset.max_seq_length",
        "General.tokenizer_name",
        "Training.dpo_beta",
        "Training.resources_per_worker.HPU",
    ]


def test_the_value_of_an_unknown_key_is_kept_nowhere() -> None:
    request = parse(hf_tokn="hf_canary", General={"config": {"tokn": "hf_canary"}})
    assert "hf_canary" not in repr(request) + json.dumps(request.model_dump(mode="json"))
    assert "hf_canary" not in " ".join(request_warnings(request))


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"training_file": None}, "training_file"),
        ({"training_file": ""}, "training_file"),
        ({"model": 5}, "model"),
        ({"suffix": "../up"}, "suffix"),
        ({"suffix": "x" * 65}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"seed": True}, "seed"),
        ({"seed": 10**30}, "seed"),
        ({"metadata": {"k": 5}}, "metadata.k"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"method": {"type": "dpo"}}, "method.type"),
        ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": 0}}, "hyperparameters.batch_size"),
        ({"General": 5}, "General"),
        ({"General": {"report_to": "mail"}}, "General.report_to"),
        ({"General": {"config": {"trust_remote_code": True}}}, "General.config.trust_remote_code"),
        ({"General": {"lora_config": {"r": 0}}}, "General.lora_config.r"),
        ({"General": {"lora_config": {"r": 10**12}}}, "General.lora_config.r"),
        ({"General": {"lora_config": {"lora_dropout": 1}}}, "General.lora_config.lora_dropout"),
        ({"General": {"lora_config": {"target_modules": []}}}, "General.lora_config.target_modules"),
        ({"General": {"lora_config": {"target_modules": ["a b"]}}}, "General.lora_config.target_modules"),
        ({"Dataset": {"max_length": 1}}, "Dataset.max_length"),
        ({"Dataset": {"validation_split_percentage": 100}}, "Dataset.validation_split_percentage"),
        ({"Dataset": {"padding_side": "top"}}, "Dataset.padding_side"),
        ({"Training": {"device": "hpu"}}, "Training.device"),
        ({"Training": {"epochs": float("inf")}}, "Training.epochs"),
        ({"hyperparameters": {"batch_size": "Auto"}}, "hyperparameters.batch_size"),
        ({"hyperparameters": {"learning_rate_multiplier": ""}}, "hyperparameters.learning_rate_multiplier"),
        ({"Training": {"learning_rate": "fast"}}, "Training.learning_rate"),
        ({"Training": {"learning_rate": 0}}, "Training.learning_rate"),
        ({"Training": {"batch_size": "automatic"}}, "Training.batch_size"),
        ({"Training": {"batch_size": ["auto"]}}, "Training.batch_size"),
        ({"Training": {"batch_size": True}}, "Training.batch_size"),
        ({"Training": {"epochs": "auto"}}, "Training.epochs"),
        ({"Training": {"accelerate_mode": "FSDP"}}, "Training.accelerate_mode"),
        ({"Training": {"resources_per_worker": {"CPU": 0}}}, "Training.resources_per_worker.CPU"),
    ],
)
def test_a_wrong_value_is_refused_with_its_field(body: dict[str, Any], field: str) -> None:
    assert refused_fields(**body) == [field]


def test_values_as_old_clients_write_them_are_read() -> None:
    request = parse(
        seed="7",
        General={"lora_config": {"r": "16", "target_modules": "q_proj, v_proj"}},
        Dataset={"max_train_samples": 0},
        Training={"device": "GPU"},
        hyperparameters=None,
        validation_file=None,
    )
    lora = request.General.lora_config
    assert lora is not None
    assert (request.seed, lora.r, lora.target_modules) == (7, 16, ["q_proj", "v_proj"])
    assert request.Dataset.max_train_samples is None
    assert request.Training.device == "cuda"


def test_hyperparameters_override_training_and_the_multiplier_multiplies_the_default() -> None:
    request = parse(
        hyperparameters={"n_epochs": 3, "learning_rate_multiplier": 2, "batch_size": "auto"},
        Training={"epochs": 5, "batch_size": 8, "learning_rate": 1e-3},
    )
    values, warnings = effective(request)
    assert (values.epochs, values.batch_size, values.learning_rate) == (3, 8, 1e-4)
    assert values.answer() == {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 2.0}
    assert len(warnings) == 2
    assert "Training.epochs is overridden" in warnings[0]


def test_hyperparameters_may_be_given_in_both_places_but_not_differ() -> None:
    def with_batch(size: int) -> JobRequest:
        method = {"type": "supervised", "supervised": {"hyperparameters": {"batch_size": size}}}
        return parse(hyperparameters={"batch_size": 4}, method=method)

    assert effective(with_batch(4))[0].batch_size == 4
    with pytest.raises(InvalidRequest, match="give one of them") as caught:
        effective(with_batch(5))
    assert caught.value.param == "hyperparameters.batch_size"


AUTO = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}


@pytest.mark.parametrize(
    "body",
    [
        {"Training": {"batch_size": "auto", "learning_rate": "auto"}},
        {"hyperparameters": AUTO},
        {"method": {"type": "supervised", "supervised": {"hyperparameters": AUTO}}},
        {"hyperparameters": AUTO, "Training": {"batch_size": None, "learning_rate": "auto"}},
    ],
)
def test_auto_in_either_form_is_left_to_the_run_and_answered_as_auto(body: dict[str, Any]) -> None:
    request = parse(**body)
    assert JobRequest.model_validate(request.model_dump(mode="json")) == request
    values, warnings = effective(request)
    assert values.answer() == {"n_epochs": 1, "batch_size": "auto", "learning_rate_multiplier": "auto"}
    assert sorted(values.spec_fields().pop("auto")) == ["batch_size", "learning_rate"]
    assert warnings == []


def test_a_number_comes_before_auto() -> None:
    nested = {"type": "supervised", "supervised": {"hyperparameters": AUTO}}
    values, warnings = effective(
        parse(hyperparameters={"batch_size": 4}, method=nested, Training={"learning_rate": 1e-3})
    )
    assert (values.batch_size, values.learning_rate, warnings) == (4, 1e-3, [])
    assert values.spec_fields() == {"epochs": 1, "batch_size": 4, "learning_rate": 1e-3, "auto": []}

    values, warnings = effective(parse(hyperparameters={"batch_size": 4}, Training={"batch_size": "auto"}))
    assert values.batch_size == 4
    assert warnings == ["Training.batch_size is overridden by hyperparameters.batch_size."]
