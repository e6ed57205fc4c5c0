"""Time to score one configuration of a super-adapter: the plain way, and what each lever adds.

``python -m tests.benchmarks.evaluation --model DIR --data FILE``: the questions of FILE (of LLM-Adapters'
records the answers' texts are scored) by SmolLM2 with a super-adapter of random weights. The ways take turns
on slices of the questions, so that neighbours on the machine slow all of them alike. What each way chooses is
compared with what the plain one does, and its log-likelihoods of some other questions, each row by itself,
with those of a softmax in float64.

- plain: transformers and PEFT, one choice a row, batches of 32 in the order of the file, padded, all logits;
- sorted: rows of similar length together, logits only where scored;
- packed: the preamble once a batch, the prompt once an item, no padding, transformers' layers;
- fused: the same through our own layers, one configuration;
- neighbours: eight in one batch that differ from one in one group each (random ones share too little to be
  one batch and are scored one by one).
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel

from comps.tuning.data.tokenise import Row
from comps.tuning.elastic.model import ElasticController, build_adapter
from comps.tuning.elastic.space import SearchSpace
from comps.tuning.evaluation.items import Items
from comps.tuning.evaluation.questions import read_questions
from comps.tuning.evaluation.scorer import TOKENS, Scorer
from comps.tuning.evaluation.scores import Configuration, RowScore, Scores
from comps.tuning.evaluation.tree import sizes
from comps.tuning.models.load import load_base_model, load_tokenizer
from comps.tuning.spec import LoraSpec, ModelSpec, RankGroup
from tests.benchmarks.machine import Load, describe, sgemm

COPIES, BATCH, WARM_UP = 8, 32, 16
MODULES = (("q_proj", "k_proj", "v_proj"), ("up_proj",), ("down_proj",))


def load(path: Path) -> tuple[PeftModel, SearchSpace, ElasticController]:
    base = load_base_model(ModelSpec(name=path.name, path=str(path.resolve())))
    torch.manual_seed(0)  # A is drawn, and every way has to have the same
    groups = tuple(RankGroup(modules=modules, ranks=(16, 12, 8)) for modules in MODULES)
    model, space, controller = build_adapter(base, LoraSpec(r=16, alpha=32, groups=groups))
    assert space is not None
    assert controller is not None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B" in name:
                weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))
    return model.eval(), space, controller


@torch.inference_mode()
def plain(model: PeftModel, rows: list[Row]) -> list[RowScore]:
    """As one would write it: all logits of padded batches in the order of the file."""
    found = []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        longest = max(len(row.ids) for row in part)
        ids = torch.zeros(len(part), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(part):
            ids[number, : len(row.ids)], mask[number, : len(row.ids)] = torch.tensor(row.ids), 1
        logits = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        for number, row in enumerate(part):
            places = [place for place, learnt in enumerate(row.learnt) if learnt]
            each = logits[number, [place - 1 for place in places], ids[number, places]]
            found.append(RowScore(each.sum().item(), len(places), 0))
    return found


@torch.inference_mode()
def exact(model: PeftModel, rows: list[Row]) -> list[float]:
    """Log-likelihoods of rows by themselves, the softmax in float64."""
    found = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
        places = [place for place, learnt in enumerate(row.learnt) if learnt]
        found.append(sum(logits[place - 1, row.ids[place]].item() for place in places))
    return found


class Way:
    """One way, with the time it took so far: of the clock and of all its threads, a configuration."""

    def __init__(self, name: str, score: Callable[[Items], Scores], share: int = 1) -> None:
        self.name, self._score, self._share = name, score, share
        self.seconds = self.cpu = 0.0
        self.chosen: list[float] = []
        self.found: list[float] = []

    def run(self, items: Items, timed: bool) -> None:
        began, cpu = time.perf_counter(), time.process_time()
        scores = self._score(items)
        if timed:
            self.seconds += (time.perf_counter() - began) / self._share
            self.cpu += (time.process_time() - cpu) / self._share
            self.chosen += scores.per_item("acc") + scores.per_item("acc_norm")
        else:
            self.found += [row.log_likelihood for result in scores.results for row in result]


def ways(path: Path, tokens: int) -> list[Way]:
    model, space, controller = load(path)
    first = space.heuristic
    chance = random.Random(0)
    near: list[Configuration] = [first]
    while len(near) < COPIES:
        place = chance.randrange(len(space))
        near.append((*first[:place], chance.choice((16, 8)), *first[place + 1 :]))

    def plainly(items: Items) -> Scores:
        with controller.at(first):
            found = iter(plain(model, [row for item in items for row in item.rows]))
        return Scores(first, items, tuple(tuple(next(found) for _ in item.rows) for item in items))

    def by(way: str, configurations: list[Configuration]) -> Callable[[Items], Scores]:
        own_model, _, own = load(path)
        scorer = Scorer(own_model, own, way=way, tokens=tokens)
        if scorer.way != way:
            raise SystemExit(f"this model cannot be scored {way}")
        return lambda items: scorer.score(items, configurations)[0]

    return [
        Way("plain", plainly),
        Way("sorted", by("padded", [first])),
        Way("packed", by("packed", [first])),
        Way("fused", by("fused", [first])),
        Way("neighbours", by("fused", near), COPIES),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory of SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, required=True, help="LLM-Adapters' ARC-Easy/test.json")
    parser.add_argument("--items", type=int, default=300)
    parser.add_argument("--slice", type=int, default=100, help="questions a turn")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens a batch of ours")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = load_tokenizer(ModelSpec(name="model", path=str(arguments.model.resolve())))
    questions = read_questions(arguments.data, texts=True, choices=True, limit=arguments.items + WARM_UP)
    items = Items.choices(questions, tokenizer)
    warm_up, items = items[arguments.items :], items[: arguments.items]
    sides = ways(arguments.model, arguments.tokens)
    model, space, controller = load(arguments.model)
    with controller.at(space.heuristic):
        expected = exact(model, [row for item in warm_up for row in item.rows])
    del model, controller
    rate, load_, began = sgemm(), Load(), time.process_time()
    for side in sides:
        side.run(warm_up, timed=False)
    for start in range(0, len(items), arguments.slice):
        for side in sides:
            side.run(items[start : start + arguments.slice], timed=True)
    others = load_.others(time.process_time() - began)
    rows = [row for item in items for row in item.rows]
    padded = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    print(f"{describe()}; {len(items)} items, {len(rows)} rows, {arguments.threads} threads")
    print(
        f"tokens: {sum(len(part) * max(len(row.ids) for row in part) for part in padded)} padded, "
        f"{sum(len(row.ids) for row in rows)} without padding, "
        f"{sum(sizes(items))} as trees"
    )
    print(
        "| way | s a configuration | times plain | CPU s | times plain | largest difference | same choices |"
    )
    print("|---|---|---|---|---|---|---|")
    first = sides[0]
    for side in sides:
        apart = max(abs(mine - own) for mine, own in zip(side.found, expected, strict=True))
        same = side.chosen == first.chosen
        print(
            f"| {side.name} | {side.seconds:.2f} | {first.seconds / side.seconds:.2f} | {side.cpu:.2f} "
            f"| {first.cpu / side.cpu:.2f} | {apart:.1e} | {'yes' if same else 'no'} |"
        )
    print(f"\nsgemm before {rate:.0f}, after {sgemm():.0f} GFLOP/s; cores used by others {others:.2f}")


if __name__ == "__main__":
    main()
