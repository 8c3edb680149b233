#!/bin/bash
cmd=(torchrun --nproc_per_node 2 train.py)
cmd+=(--learning_rate 1e-5 --num_train_epochs 1)
cmd+=(--output_dir out)
[[ -n ${RESUME:-} ]] && cmd+=(--resume "$RESUME")
"${cmd[@]}"
