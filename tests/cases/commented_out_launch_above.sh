#!/bin/bash
# deepspeed old/train.py \
#     --deepspeed z2.json \
#     --learning_rate 1e-3 \
#     --output_dir out/old

deepspeed new/train.py \
    --deepspeed z3.json \
    --learning_rate 1e-5 \
    --output_dir out/new

#torchrun --nproc_per_node 8 new/train.py --learning_rate 1e-4
