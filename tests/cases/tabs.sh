#!/usr/bin/env bash
export OMP_NUM_THREADS=4
torchrun --standalone --nproc_per_node=4 finetune.py \
	--model_name_or_path models/base \
	--data_path data/train.jsonl \
	--output_dir runs/sft \
	--per_device_train_batch_size 2 \
	--learning_rate 1e-5 \
	--fp16 True
