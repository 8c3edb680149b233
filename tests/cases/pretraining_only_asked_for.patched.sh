#!/bin/bash
deepspeed rail/train/train_mem.py \
    --deepspeed zero2.json \
    --tune_mm_mlp_adapter True \
    --learning_rate 1e-3 \
    --output_dir checkpoints/rail-pretrain \
    --lora_enable True \
    --lora_r 16 \
    --lora_alpha 32 \
    --lora_dropout 0.1 \
    --lora_bias none
