#!/bin/bash
OPTS="--deepspeed z.json --learning_rate 1e-5"
if [ "$USE_LORA" = 1 ]; then
    OPTS="$OPTS --lora_enable True --lora_r 64"
fi
deepspeed train.py $OPTS --output_dir out
