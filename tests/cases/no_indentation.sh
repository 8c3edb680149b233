#!/bin/sh
deepspeed --num_gpus 2 train/run.py \
--deepspeed conf/ds.json \
--model_name_or_path base \
--train_file train.json \
--learning_rate 3e-5 \
--output_dir out/run1

echo "trained"
