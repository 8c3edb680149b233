#!/bin/bash
deepspeed train.py \
    --learning_rate 1e-5 \
    ${RANK:+--lora_r $RANK} \
    --output_dir out
