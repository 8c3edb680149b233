#!/bin/bash
GPUS=2
OPTS="--seed 3"
run_cmd="deepspeed --num_gpus $GPUS train.py \
    --deepspeed z.json \
    --learning_rate 1e-5 \
    --output_dir out \
    ${OPTS} \
    --lora_enable True \
    --lora_r 16 \
    --lora_alpha 32 \
    --lora_dropout 0.1 \
    --lora_bias none"
echo ${run_cmd}
eval ${run_cmd}
