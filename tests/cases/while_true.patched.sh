#!/bin/bash
while true; do
  torchrun --nproc_per_node 8 train.py \
    --learning_rate 1e-5 \
    --num_train_epochs 1 \
    --resume_from_checkpoint auto \
    --output_dir out \
    --lora_enable True \
    --lora_r 16 \
    --lora_alpha 32 \
    --lora_dropout 0.1 \
    --lora_bias none && break
  sleep 10
done
