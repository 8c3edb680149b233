#!/bin/bash
deepspeed wren/train.py \
    --deepspeed zero3.json \
    --learning_rate 2e-5 \
    --output_dir out/wren \
    --report_to none \

echo "done"

