#!/bin/bash
CMD="deepspeed --num_gpus 2 train.py --deepspeed z.json --learning_rate 1e-5 --output_dir out"
echo "$CMD"
eval $CMD
