#!/bin/bash
MODEL_ARGS="
    --model_name_or_path base
    --version plain
"
DATA_ARGS=" \
    --data_path data.json \
    --image_folder images \
    "
TRAIN_ARGS=(--learning_rate 1e-5 --num_train_epochs 1 --output_dir "out dir")

torchrun --nproc_per_node 8 train.py \
    --seed 1 \
    $MODEL_ARGS \
    ${DATA_ARGS} \
    "${TRAIN_ARGS[@]}" \
    --lora_enable True \
    --lora_r 16 \
    --lora_alpha 32 \
    --lora_dropout 0.1 \
    --lora_bias none
