#!/bin/bash
# MMBench: answers of the model NAME to the held-out multiple-choice questions of SPLIT, and their score.
# usage: mmbench.sh NAME SPLIT [CUDA_IDX]
set -euo pipefail
SCRIPT_DIR=$(cd "$(dirname "$0")" && pwd)
NAME=${1:?usage: mmbench.sh NAME SPLIT [CUDA_IDX]}
SPLIT=${2:?usage: mmbench.sh NAME SPLIT [CUDA_IDX]}
QUESTIONS=$SCRIPT_DIR/../training/data/eval_stage_1/mmbench/$SPLIT.tsv
RESULTS=$SCRIPT_DIR/../../output/eval_results/$NAME/mmbench

mkdir -p "$RESULTS/answers/$SPLIT"
rm -f "$RESULTS/answers/$SPLIT/$NAME.jsonl" "$RESULTS/score.json"

CUDA_VISIBLE_DEVICES=${3:-0} python "$SCRIPT_DIR/../training/mgm/eval/model_vqa_mmbench.py" \
    --model-path "$SCRIPT_DIR/../../output/training_dirs/$NAME" \
    --model-base "$SCRIPT_DIR/../training/model_zoo/LLM/gemma/gemma-2b-it" \
    --question-file "$QUESTIONS" \
    --answers-file "$RESULTS/answers/$SPLIT/$NAME.jsonl"

python "$SCRIPT_DIR/../training/mgm/eval/eval_mmbench.py" \
    --annotation-file "$QUESTIONS" \
    --result-file "$RESULTS/answers/$SPLIT/$NAME.jsonl" \
    --score-file "$RESULTS/score.json"
