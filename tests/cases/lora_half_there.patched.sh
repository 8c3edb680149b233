#!/bin/bash
deepspeed gull/train/train_mem.py \
    --lora_enable True --lora_r 16 --lora_alpha 32 --mm_projector_lr 2e-5 \
    --deepspeed ./scripts/zero3.json \
    --model_name_or_path base-13b \
    --data_path data.json \
    --output_dir ./checkpoints/gull-13b-lora \
    --num_train_epochs 1 \
    --learning_rate 2e-4 \
    --report_to wandb \
    --lora_dropout 0.1 \
    --lora_bias none
