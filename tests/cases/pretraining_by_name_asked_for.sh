#!/bin/bash
torchrun --nproc_per_node 4 vlm/pretrain.py --learning_rate 1e-4 --num_train_epochs 1 --output_dir out/pretrain
