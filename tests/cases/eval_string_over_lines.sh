#!/bin/bash
GPUS=2
OPTS="--seed 3"
run_cmd="deepspeed --num_gpus $GPUS train.py \
    --deepspeed z.json \
    --learning_rate 1e-5 \
    --output_dir out \
    ${OPTS}"
echo ${run_cmd}
eval ${run_cmd}
