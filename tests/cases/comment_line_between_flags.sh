#!/bin/bash
deepspeed train.py \
    --deepspeed z.json \
    --learning_rate 1e-5 \
    # --bf16 True \
    --output_dir out \
    --report_to none
