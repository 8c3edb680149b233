#!/bin/bash
# TextVQA: answers of the model NAME to the held-out open questions, and their exact-match score.
# usage: textvqa.sh NAME [CUDA_IDX[,CUDA_IDX...]]
set -euo pipefail
SCRIPT_DIR=$(cd "$(dirname "$0")" && pwd)
NAME=${1:?usage: textvqa.sh NAME [CUDA_IDX[,CUDA_IDX...]]}
IFS=',' read -ra GPUS <<< "${2:-0}"
DATA=$SCRIPT_DIR/../training/data/eval_stage_1/textvqa
RESULTS=$SCRIPT_DIR/../../output/eval_results/$NAME/textvqa

mkdir -p "$RESULTS"
rm -f "$RESULTS"/*.jsonl "$RESULTS/score.json"

# one process a GPU, each with its part of the questions
jobs=()
for i in "${!GPUS[@]}"; do
    CUDA_VISIBLE_DEVICES=${GPUS[i]} python "$SCRIPT_DIR/../training/mgm/eval/model_vqa_loader.py" \
        --model-path "$SCRIPT_DIR/../../output/training_dirs/$NAME" \
        --model-base "$SCRIPT_DIR/../training/model_zoo/LLM/gemma/gemma-2b-it" \
        --question-file "$DATA/llava_textvqa_val_v051_ocr.jsonl" \
        --image-folder "$DATA/train_images" \
        --answers-file "$RESULTS/${#GPUS[@]}_$i.jsonl" \
        --num-chunks "${#GPUS[@]}" \
        --chunk-idx "$i" &
    jobs+=($!)
done
for job in "${jobs[@]}"; do
    wait "$job"
done
for i in "${!GPUS[@]}"; do
    cat "$RESULTS/${#GPUS[@]}_$i.jsonl"
done > "$RESULTS/bm1.jsonl"

python "$SCRIPT_DIR/../training/mgm/eval/eval_textvqa.py" \
    --annotation-file "$DATA/TextVQA_0.5.1_val.json" \
    --result-file "$RESULTS/bm1.jsonl" \
    --score-file "$RESULTS/score.json"
