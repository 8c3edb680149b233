#!/bin/bash
# stage 1: align the projector
deepspeed rail/train/train_mem.py \
    --deepspeed ./scripts/zero2.json \
    --model_name_or_path base \
    --tune_mm_mlp_adapter True \
    --output_dir ./checkpoints/rail-pretrain \
    --learning_rate 1e-3 \
    --report_to none

# stage 2: visual instruction tuning
deepspeed rail/train/train_mem.py \
    --deepspeed ./scripts/zero3.json \
    --model_name_or_path base \
    --pretrain_mm_mlp_adapter ./checkpoints/rail-pretrain/mm_projector.bin \
    --output_dir ./checkpoints/rail-finetune \
    --learning_rate 2e-5 \
    --report_to none
