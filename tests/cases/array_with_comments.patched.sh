#!/bin/bash
ARGS=(
    # the model
    --model_name_or_path base

    # the schedule
    --learning_rate 1e-5   # small
    --num_train_epochs 1
    --output_dir out
)
accelerate launch train.py "${ARGS[@]}" --lora_enable True --lora_r 16 --lora_alpha 32 --lora_dropout 0.1 --lora_bias none || exit 1
