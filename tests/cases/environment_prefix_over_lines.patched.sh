#!/bin/bash
NCCL_P2P_DISABLE=1 \
TOKENIZERS_PARALLELISM=false \
torchrun --nproc_per_node 2 train/sft.py \
    --learning_rate 1e-5 \
    --num_train_epochs 1 \
    --output_dir out \
    --lora_enable True \
    --lora_r 16 \
    --lora_alpha 32 \
    --lora_dropout 0.1 \
    --lora_bias none
