"""Ranks and alphas from a foreign adapter's config: PEFT's patterns, as names and nothing else."""

from __future__ import annotations

import re

import pytest
from peft.utils.other import get_pattern_key

from comps.tuning.errors import AdapterError
from comps.tuning.export.declared import read_alphas, read_ranks

CONFIG = {"r": 8, "lora_alpha": 16}
Q_0, Q_10 = "model.layers.0.self_attn.q_proj", "model.layers.10.self_attn.q_proj"
MODULES = (Q_0, Q_10, f"inner.{Q_0}", "q_proj", "model.eq_proj", "up-proj")


@pytest.mark.parametrize(
    "key", ["q_proj", r"0\.self_attn\.q_proj", Q_0, f"^{re.escape(Q_0)}", "^q_proj$", "q_proj$", r"up\-proj"]
)
def test_a_name_means_what_it_means_to_peft(key):
    ranks = read_ranks(CONFIG | {"rank_pattern": {key: 4}}, "a")
    assert [ranks.of(module) == 4 for module in MODULES] == [
        get_pattern_key([key], module) == key for module in MODULES
    ]


def test_the_first_key_that_names_a_module_counts():
    ranks = read_ranks(CONFIG | {"rank_pattern": {re.escape(Q_0): 2, "q_proj": 4}}, "a")
    assert [ranks.of(module) for module in (Q_0, Q_10, "model.o_proj")] == [2, 4, 8]


@pytest.mark.parametrize("key", ["(", "(([a-z_0-9])+)+X", ".*q_proj", "q_proj|k_proj", r"\d", "", "^", "[q]"])
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_other_regular_expressions_are_refused(field, key):
    with pytest.raises(AdapterError, match=rf"^a: {field} has the key .* only names of modules"):
        (read_ranks if field == "rank_pattern" else read_alphas)(CONFIG | {field: {key: 4}}, "a")


@pytest.mark.parametrize(
    "fields",
    [
        {"rank_pattern": ["x"]},
        {"rank_pattern": {"q_proj": "x"}},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": {"q_proj": True}},
        {"rank_pattern": {"q_proj": 4.5}},
        {"r": 10**400},
        {"r": None},
        {"alpha_pattern": 5},
        {"alpha_pattern": {"q_proj": None}},
        {"alpha_pattern": {"q_proj": [1]}},
        {"lora_alpha": 10**400},
        {"lora_alpha": float("inf")},
        {"lora_alpha": float("nan")},
        {"lora_alpha": "16"},
    ],
)
def test_what_is_no_number_is_refused(fields):
    with pytest.raises(AdapterError, match=r"^a(:| has) .{,150}$"):
        read_ranks(CONFIG | fields, "a"), read_alphas(CONFIG | fields, "a")
