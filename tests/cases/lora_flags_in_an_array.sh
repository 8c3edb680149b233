#!/bin/bash
LORA_ARGS=(
    --lora_enable True
    --lora_r 64
    --lora_alpha 32
    --lora_dropout "0.05"
    --lora_bias none
)
deepspeed train.py \
    --deepspeed z.json \
    --learning_rate 1e-4 \
    --output_dir out \
    "${LORA_ARGS[@]}"
