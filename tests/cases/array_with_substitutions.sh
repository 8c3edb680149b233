#!/bin/bash
ARGS=(
    --lora_r 64
    --data_path "$(cd "$(dirname "$0")" && echo "data set")"
    --run_name `echo night`-$((1 + 1))
    --learning_rate 1e-5
    --max_steps $(echo 10)
)
deepspeed train.py "${ARGS[@]}"
