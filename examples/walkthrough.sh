#!/usr/bin/env bash
# The main job with curl, against a running service (make model, then make serve in another terminal).
set -euo pipefail

URL=${URL:-http://127.0.0.1:8015}
field() { python3 -c "import json, sys; a = json.load(sys.stdin); print(a.get('$1') or sys.exit(a['detail']))"; }

# 1. Upload the training data.
FILE=$(curl -sS --fail-with-body $URL/v1/files -F purpose=fine-tune -F file=@examples/data/bookings_train.json | field id)

# 2. Train a super-adapter with three rank groups.
JOB=$(curl -sS --fail-with-body $URL/v1/fine_tuning/jobs -H 'Content-Type: application/json' -d '{
  "training_file": "'$FILE'",
  "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
  "General": {
    "lora_config": {
      "r": 16, "lora_alpha": 32, "lora_dropout": 0,
      "neural_lora_search": true,
      "target_module_groups": [["q_proj", "k_proj", "v_proj"], ["up_proj"], ["down_proj"]],
      "search_space": ["16,12,8", "16,12,8", "16,12,8"]
    }
  },
  "Dataset": {"max_length": 256},
  "Training": {"epochs": 3, "batch_size": 16, "learning_rate": 1e-3}
}' | field id)

# 3. Watch it: the state, the events (newest first), the log.
curl -sS --fail-with-body $URL/v1/fine_tuning/jobs/$JOB
curl -sS --fail-with-body "$URL/v1/fine_tuning/jobs/$JOB/events?limit=5"
curl -sS --fail-with-body "$URL/v1/fine_tuning/jobs/$JOB/logs?follow=true"
curl -sS --fail-with-body $URL/v1/fine_tuning/jobs/retrieve -d '{"fine_tuning_job_id": "'$JOB'"}'
curl -sS --fail-with-body $URL/v1/finetune/list_checkpoints -d '{"fine_tuning_job_id": "'$JOB'"}'

# 4. Cut out the heuristic sub-adapter, and one of your own: a rank for each group and layer.
curl -sS --fail-with-body $URL/v1/finetune/extract_adapter -d '{"fine_tuning_job_id": "'$JOB'"}'
CONFIG=$(python3 -c 'print(([16] * 15 + [8] * 15) * 3)')
curl -sS --fail-with-body $URL/v1/finetune/extract_adapter -d '{
  "fine_tuning_job_id": "'$JOB'", "adapter_version": "half", "custom_config": '"$CONFIG"'
}'

# 5. Merge a sub-adapter into the base model.
curl -sS --fail-with-body $URL/v1/finetune/merge_adapter -d '{"fine_tuning_job_id": "'$JOB'", "adapter_version": "heuristic"}'

# 6. Everything that came of it has a name.
curl -sS --fail-with-body $URL/v1/models
