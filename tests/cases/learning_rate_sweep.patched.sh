#!/bin/bash
for lr in 1e-5 2e-5 5e-5
do
    deepspeed --master_port 29600 train.py \
        --deepspeed z.json \
        --learning_rate $lr \
        --output_dir out/lr_$lr \
        --lora_enable True \
        --lora_r 16 \
        --lora_alpha 32 \
        --lora_dropout 0.1 \
        --lora_bias none \
        > lr_$lr.log 2>&1
done
