#!/bin/bash
MODE=${1:-eval}
if [[ $MODE == train ]]; then
    deepspeed heron/train/train.py \
        --deepspeed z.json \
        --learning_rate 1e-5 \
        --output_dir checkpoints/heron-finetune
else
    python -m heron.eval.model_vqa \
        --model-path checkpoints/heron-finetune \
        --question-file data/questions.jsonl \
        --answers-file answers.jsonl
fi
