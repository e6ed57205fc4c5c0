"""The loss on labelled positions alone is the loss, and so are its gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures_batches import assert_same_gradients
from fixtures_models import save_tiny_model, tiny_model
from fixtures_training import run, train_spec, write_records
from torch.nn import functional

from comps.tuning.training.loss import keeps_positions, labelled_only, mean_loss

FAMILIES = ("llama", "qwen2", "mistral", "gemma2", "phi", "opt", "bloom", "gpt2")


def batch() -> dict[str, torch.Tensor]:
    """Three rows with answers in different places; one has none; padding left and right."""
    torch.manual_seed(0)
    ids = torch.randint(3, 300, (3, 12))
    labels = torch.full_like(ids, -100)
    labels[0, 5:9] = ids[0, 5:9]
    labels[1, 0] = ids[1, 0]  # nothing comes before the first token, so it is not learnt
    labels[1, 11] = ids[1, 11]
    mask = torch.ones_like(ids)
    mask[0, 9:], mask[1, :0], mask[2, :4] = 0, 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain(model: torch.nn.Module, inputs: dict[str, torch.Tensor], items: int | None) -> torch.Tensor:
    """All logits, and the textbook's formula."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    labels = inputs["labels"][:, 1:]
    total = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return total / (items or int((labels != -100).sum()))


@pytest.mark.parametrize("items", [None, 11])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_those_of_all_logits(family: str, items: int | None) -> None:
    model = tiny_model(family)
    assert keeps_positions(model)
    expected = plain(model, batch(), items)
    expected.backward()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()

    inputs = labelled_only(batch())
    labels = inputs.pop("labels")
    outputs = model(**inputs)
    assert outputs.logits.shape == (5, 300), "one row of logits for each label"
    loss = mean_loss(outputs, labels, None if items is None else torch.tensor(items))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    ours = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    assert_same_gradients(ours, gradients)


def test_a_batch_without_any_label_costs_nothing_and_breaks_nothing() -> None:
    inputs = labelled_only(batch() | {"labels": torch.full((3, 12), -100)})
    labels = inputs.pop("labels")
    loss = mean_loss(tiny_model()(**inputs), labels)
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_logs_the_loss_that_the_model_itself_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    """The same training through transformers' own loss on all logits."""
    model = save_tiny_model(tmp_path / "model")
    data = write_records(tmp_path / "records.json")
    settings = {"max_train_steps": 4, "gradient_accumulation_steps": accumulation}
    settings["validation_split_percentage"] = 10
    monkeypatch.setattr("comps.tuning.training.trainer.packs", lambda model, longest: False)
    ours = run(train_spec(tmp_path / "ours", model, data, **settings))
    monkeypatch.setattr("comps.tuning.training.trainer.keeps_positions", lambda model: False)
    theirs = run(train_spec(tmp_path / "theirs", model, data, **settings))
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    assert [each for _, each in ours.series("valid_loss")] == pytest.approx(
        [each for _, each in theirs.series("valid_loss")], rel=1e-5
    )
