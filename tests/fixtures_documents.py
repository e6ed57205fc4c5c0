"""The request bodies of the published documents, as they stand there (the model's name aside)."""

from __future__ import annotations

from typing import Any

# OPEA's fine-tuning README.
OPEA_INSTRUCTION_TUNING: dict[str, Any] = {
    "training_file": "alpaca_data.json",
    "model": "meta-llama/Llama-2-7b-chat-hf",
}
OPEA_PRETRAINING: dict[str, Any] = {
    "training_file": "alpaca_data.json",
    "model": "meta-llama/Llama-2-7b-hf",
    "General": {"task": "pretraining", "lora_config": None},
}
OPEA_OTHER_TASKS: list[dict[str, Any]] = [
    {
        "training_file": "toy_finetune_data.jsonl",
        "model": "BAAI/bge-reranker-large",
        "General": {"task": "rerank", "lora_config": None},
    },
    {
        "training_file": "toy_finetune_data.jsonl",
        "model": "BAAI/bge-base-en-v1.5",
        "General": {"task": "embedding", "lora_config": None},
        "Dataset": {"query_max_len": 128, "passage_max_len": 128, "padding": "max_length"},
    },
    {
        "training_file": "test_data.jsonl",
        "model": "meta-llama/Llama-2-7b-hf",
        "General": {"task": "dpo"},
    },
]

# SQFT's README for the OPEA service: one group, three groups.
SQFT_ONE_GROUP: dict[str, Any] = {
    "training_file": "arce_train_instruct.json",
    "model": "meta-llama/Llama-3.2-1B",
    "General": {
        "lora_config": {
            "r": 16,
            "lora_alpha": 32,
            "neural_lora_search": True,
            "target_module_groups": [["q_proj", "k_proj", "v_proj"]],
            "search_space": ["16,12,8"],
        }
    },
    "Training": {"learning_rate": 1e-04, "epochs": 5, "batch_size": 16},
    "Dataset": {"max_length": 256},
}
SQFT_THREE_GROUPS: dict[str, Any] = {
    "training_file": "arce_train_instruct.json",
    "model": "meta-llama/Llama-3.2-1B",
    "General": {
        "lora_config": {
            "r": 16,
            "neural_lora_search": True,
            "target_module_groups": [["q_proj", "k_proj", "v_proj"], ["up_proj"], ["down_proj"]],
            "search_space": ["16,12,8", "16,12,8", "16,12,8"],
        }
    },
}
# The SQFT microservice's README.
SQFT_MODULES: dict[str, Any] = {
    "training_file": "arce_train_instruct.json",
    "model": "meta-llama/Llama-3.2-1B",
    "General": {
        "lora_config": {
            "r": 16,
            "lora_alpha": 32,
            "target_modules": ["q_proj", "k_proj", "v_proj"],
            "neural_lora_search": True,
            "nls_target_modules": ["q_proj", "k_proj", "v_proj"],
            "search_space": [16, 12, 8],
        }
    },
    "Training": {"learning_rate": 1e-04, "epochs": 5, "batch_size": 16},
    "Dataset": {"max_length": 256},
}
SQFT_SPARSE: dict[str, Any] = {
    "training_file": "alpaca_data.json",
    "model": "meta-llama/Llama-3.2-1B",
    "General": {"lora_config": {"sparse_adapter": True}},
}

# With the comma after the list, as published.
SQFT_CUSTOM_EXTRACT = """{
    "fine_tuning_job_id": "JOB",
    "adapter_version": "optimal",
    "custom_config": [16, 12, 8, 8, 16, 12, 16, 16, 16, 16, 16, 8, 16, 12, 8, 12],
  }"""

ACCEPTED = {
    "opea-instruction-tuning": OPEA_INSTRUCTION_TUNING,
    "opea-pretraining": OPEA_PRETRAINING,
    "sqft-one-group": SQFT_ONE_GROUP,
    "sqft-three-groups": SQFT_THREE_GROUPS,
    "sqft-modules": SQFT_MODULES,
}
