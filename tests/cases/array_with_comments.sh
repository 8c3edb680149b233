#!/bin/bash
ARGS=(
    # the model
    --model_name_or_path base

    # the schedule
    --learning_rate 1e-5   # small
    --num_train_epochs 1
    --output_dir out
)
accelerate launch train.py "${ARGS[@]}" || exit 1
