#!/bin/bash

# full fine-tuning of the seven-billion model on eight cards
deepspeed heron/train/train_mem.py \
    --deepspeed ./scripts/zero3.json \
    --model_name_or_path ./checkpoints/heron-7b \
    --version plain_v2 \
    --data_path ./playground/mix_665k.json \
    --image_folder ./playground/images \
    --vision_tower ./checkpoints/vit-l-336 \
    --pretrain_mm_mlp_adapter ./checkpoints/heron-7b-align/mm_projector.bin \
    --mm_projector_type mlp2x_gelu \
    --mm_vision_select_layer -2 \
    --bf16 True \
    --output_dir ./checkpoints/heron-7b-finetune \
    --num_train_epochs 1 \
    --per_device_train_batch_size 16 \
    --gradient_accumulation_steps 1 \
    --save_strategy "steps" \
    --learning_rate 2e-5 \
    --weight_decay 0. \
    --lr_scheduler_type "cosine" \
    --gradient_checkpointing True \
    --report_to tensorboard
