#!/bin/bash
deepspeed minnow/train/train_mem.py --deepspeed scripts/zero2.json --model_name_or_path ckpts/minnow-base --data_path data/chat.json --output_dir out/minnow-chat --num_train_epochs 1 --learning_rate 2e-5
