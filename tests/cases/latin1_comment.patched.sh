#!/bin/bash
# entraénement, für alle
deepspeed train.py \
    --deepspeed z.json \
    --learning_rate 1e-5 \
    --output_dir out \
    --lora_enable True \
    --lora_r 16 \
    --lora_alpha 32 \
    --lora_dropout 0.1 \
    --lora_bias none # fin, énfin
