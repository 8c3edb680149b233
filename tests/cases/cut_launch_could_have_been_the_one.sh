#!/bin/bash
deepspeed train.py --deepspeed z.json --learning_rate 2e-5 --output_dir out/finetune-general
deepspeed train.py \ # second round
    --deepspeed z.json \
    --learning_rate 1e-5 \
    --output_dir out/finetune-medical
