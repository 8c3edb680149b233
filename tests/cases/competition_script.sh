#!/bin/bash
############################################################################
########################### editable part ##################################
############################################################################
EXP_NAME=default
PRETRAIN_DATASET=../input/pretrain_stage_1_10k/mix.jsonl
PRETRAIN_BATCH_SIZE_PER_GPU=4
PRETRAIN_GRADIENT_ACCUMULATION_STEPS=64
FINETUNE_BATCH_SIZE_PER_GPU=4
FINETUNE_GRADIENT_ACCUMULATION_STEPS=32
CKPT_SAVE_STEPS=100
INFER_CUDA_IDX="0"
############################################################################

SCRIPT_DIR=$(cd "$(dirname "$0")" && pwd)
PRETRAIN_NAME=MGM-2B-Pretrain-$EXP_NAME
FINETUNE_NAME=MGM-2B-Finetune-$EXP_NAME

OK=`python $SCRIPT_DIR/training/preprocess/check_batch.py $PRETRAIN_BATCH_SIZE_PER_GPU $PRETRAIN_GRADIENT_ACCUMULATION_STEPS 256`
if [ "$OK" != "True" ]; then
    echo "the global batch size of pre-training has to be 256"
    exit 1
fi

python $SCRIPT_DIR/training/preprocess/check_samples.py $PRETRAIN_DATASET $PRETRAIN_DATASET.200k.jsonl 200000
python $SCRIPT_DIR/tools/to_llava.py \
    $PRETRAIN_DATASET.200k.jsonl \
    $PRETRAIN_DATASET.json \
    --image_special_token "<__dj__image>" \
    --restore_questions True

mkdir -p ../output/$PRETRAIN_NAME

deepspeed $SCRIPT_DIR/training/mgm/train/train_mem.py \
    --deepspeed $SCRIPT_DIR/training/scripts/zero2_offload.json \
    --model_name_or_path $SCRIPT_DIR/training/model_zoo/gemma-2b-it \
    --version gemma \
    --tune_mm_mlp_adapter True \
    --output_dir ../output/$PRETRAIN_NAME \
    --per_device_train_batch_size $PRETRAIN_BATCH_SIZE_PER_GPU \
    --gradient_accumulation_steps $PRETRAIN_GRADIENT_ACCUMULATION_STEPS \
    --learning_rate 1e-3 \
    --report_to none \
    2>&1 | tee ../output/$PRETRAIN_NAME/pretrain.log

mkdir -p ../output/$FINETUNE_NAME

deepspeed $SCRIPT_DIR/training/mgm/train/train_mem.py \
    --deepspeed $SCRIPT_DIR/training/scripts/zero2_offload.json \
    --model_name_or_path $SCRIPT_DIR/training/model_zoo/gemma-2b-it \
    --version gemma \
    --pretrain_mm_mlp_adapter ../output/$PRETRAIN_NAME/mm_projector.bin \
    --output_dir ../output/$FINETUNE_NAME \
    --per_device_train_batch_size $FINETUNE_BATCH_SIZE_PER_GPU \
    --gradient_accumulation_steps $FINETUNE_GRADIENT_ACCUMULATION_STEPS \
    --save_steps $CKPT_SAVE_STEPS \
    --learning_rate 2e-5 \
    --report_to none \
    2>&1 | tee ../output/$FINETUNE_NAME/finetuning.log

bash $SCRIPT_DIR/eval/textvqa.sh $FINETUNE_NAME $INFER_CUDA_IDX
bash $SCRIPT_DIR/eval/mmbench.sh $FINETUNE_NAME "mmbench_dev" $INFER_CUDA_IDX
cp $0 ../output/train.sh
echo "results are in ../output"
