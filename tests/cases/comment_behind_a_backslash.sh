#!/bin/bash
deepspeed train.py \
    --deepspeed z.json \
    --learning_rate 1e-5 \
    --per_device_train_batch_size 4 \   # more does not fit
    --output_dir out \
    --report_to none
