#!/bin/bash
python -m rail.eval.model_vqa \
    --model-path checkpoints/rail-finetune \
    --question-file data/questions.jsonl \
    --answers-file answers.jsonl \
    --num_beams 1
python rail/eval/eval_textvqa.py --annotation-file data/val.json --result-file answers.jsonl
