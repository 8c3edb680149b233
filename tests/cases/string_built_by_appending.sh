#!/bin/bash
CMD="torchrun --nproc_per_node 2 train.py"
CMD+=" --learning_rate 1e-5 --num_train_epochs 1"
CMD+=" --output_dir out"
if [ -n "$DEBUG" ]; then
    CMD+=" --max_steps 5"
fi
eval "$CMD"
