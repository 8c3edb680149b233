#!/bin/bash
train() {
    deepspeed train.py \
        --deepspeed z.json \
        --learning_rate 1e-5 \
        --output_dir out \
        "$@"
}

train --seed 1 --run_name "first run"
train --seed 2
