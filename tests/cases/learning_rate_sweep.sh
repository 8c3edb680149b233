#!/bin/bash
for lr in 1e-5 2e-5 5e-5
do
    deepspeed --master_port 29600 train.py \
        --deepspeed z.json \
        --learning_rate $lr \
        --output_dir out/lr_$lr \
        > lr_$lr.log 2>&1
done
