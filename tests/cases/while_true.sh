#!/bin/bash
while true; do
  torchrun --nproc_per_node 8 train.py \
    --learning_rate 1e-5 \
    --num_train_epochs 1 \
    --resume_from_checkpoint auto \
    --output_dir out && break
  sleep 10
done
