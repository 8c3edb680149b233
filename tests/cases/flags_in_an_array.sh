#!/bin/bash
ARGS=(
    --deepspeed z.json
    --model_name_or_path "my models/base"
    --learning_rate 1e-5
    --output_dir out
)
deepspeed --num_gpus 2 train.py "${ARGS[@]}"
