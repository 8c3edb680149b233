#!/bin/bash
deepspeed gull/train/train_mem.py \
    --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 \
    --deepspeed ./scripts/zero3.json \
    --model_name_or_path base-13b \
    --data_path data.json \
    --output_dir ./checkpoints/gull-13b-lora \
    --num_train_epochs 1 \
    --learning_rate 2e-4 \
    --report_to wandb
