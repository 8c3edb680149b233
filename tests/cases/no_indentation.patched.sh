#!/bin/sh
deepspeed --num_gpus 2 train/run.py \
--deepspeed conf/ds.json \
--model_name_or_path base \
--train_file train.json \
--learning_rate 3e-5 \
--output_dir out/run1 \
--lora_enable True \
--lora_r 16 \
--lora_alpha 32 \
--lora_dropout 0.1 \
--lora_bias none

echo "trained"
