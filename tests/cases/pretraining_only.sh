#!/bin/bash
deepspeed rail/train/train_mem.py \
    --deepspeed zero2.json \
    --tune_mm_mlp_adapter True \
    --learning_rate 1e-3 \
    --output_dir checkpoints/rail-pretrain
