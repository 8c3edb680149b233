#!/usr/bin/env bash
export OMP_NUM_THREADS=4
torchrun --standalone --nproc_per_node=4 finetune.py \
	--model_name_or_path models/base \
	--data_path data/train.jsonl \
	--output_dir runs/sft \
	--per_device_train_batch_size 2 \
	--learning_rate 1e-5 \
	--fp16 True \
	--lora_enable True \
	--lora_r 16 \
	--lora_alpha 32 \
	--lora_dropout 0.1 \
	--lora_bias none
