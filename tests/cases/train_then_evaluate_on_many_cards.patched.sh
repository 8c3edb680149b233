#!/bin/bash
CKPT=snipe-7b-finetune
IFS=',' read -ra GPULIST <<< "${GPU_LIST:-0,1}"
CHUNKS=${#GPULIST[@]}

deepspeed snipe/train/train_mem.py \
    --deepspeed scripts/zero3.json \
    --learning_rate 2e-5 \
    --output_dir checkpoints/$CKPT \
    --lora_enable True \
    --lora_r 16 \
    --lora_alpha 32 \
    --lora_dropout 0.1 \
    --lora_bias none

mkdir -p answers
for IDX in $(seq 0 $((CHUNKS-1))); do
    CUDA_VISIBLE_DEVICES=${GPULIST[$IDX]} python -m snipe.eval.model_vqa_loader \
        --model-path checkpoints/$CKPT \
        --num-chunks $CHUNKS \
        --chunk-idx $IDX \
        --temperature 0 &
done
wait
python scripts/merge_answers.py --dir answers --out answers/merge.jsonl
