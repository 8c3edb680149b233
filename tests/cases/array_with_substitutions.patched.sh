#!/bin/bash
ARGS=(
    --lora_r 16
    --data_path "$(cd "$(dirname "$0")" && echo "data set")"
    --run_name `echo night`-$((1 + 1))
    --learning_rate 1e-5
    --max_steps $(echo 10)
)
deepspeed train.py "${ARGS[@]}" --lora_enable True --lora_alpha 32 --lora_dropout 0.1 --lora_bias none
