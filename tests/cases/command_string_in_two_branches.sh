#!/bin/bash
if [ "$1" = big ]; then
    CMD="deepspeed train.py --deepspeed z3.json --learning_rate 1e-5 --output_dir out/big"
else
    CMD="deepspeed train.py --deepspeed z2.json --learning_rate 2e-5 --output_dir out/small"
fi
eval "$CMD"
