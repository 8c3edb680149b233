#!/bin/sh
set -e
exec torchrun --nproc_per_node 4 train.py \
  --learning_rate 1e-5 \
  --num_train_epochs 1 \
  --output_dir out \
  "$@"
