#!/bin/bash
MODE=${1:-eval}
if [[ $MODE == train ]]; then
    deepspeed heron/train/train.py \
        --deepspeed z.json \
        --learning_rate 1e-5 \
        --output_dir checkpoints/heron-finetune \
        --lora_enable True \
        --lora_r 16 \
        --lora_alpha 32 \
        --lora_dropout 0.1 \
        --lora_bias none
else
    python -m heron.eval.model_vqa \
        --model-path checkpoints/heron-finetune \
        --question-file data/questions.jsonl \
        --answers-file answers.jsonl
fi
