#!/bin/bash
#SBATCH --job-name=tern-sft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --output=slurm-%j.out
set -x

PARTITION=${PARTITION:-"gpu"}
GPUS=${GPUS:-16}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
SRUN_ARGS=${SRUN_ARGS:-""}
BATCH_SIZE=${BATCH_SIZE:-128}
PER_DEVICE_BATCH_SIZE=${PER_DEVICE_BATCH_SIZE:-4}
GRADIENT_ACC=$((BATCH_SIZE / PER_DEVICE_BATCH_SIZE / GPUS))
OUTPUT_DIR='work_dirs/tern_finetune'

module load cuda/12.1
if [ ! -d "$OUTPUT_DIR" ]; then
  mkdir -p "$OUTPUT_DIR"
fi

srun -p ${PARTITION} \
  --gres=gpu:${GPUS_PER_NODE} \
  --ntasks=${GPUS} \
  --kill-on-bad-exit=1 \
  ${SRUN_ARGS} \
  python -u tern/train/tern_finetune.py \
  --model_name_or_path "./pretrained/tern-2b" \
  --output_dir ${OUTPUT_DIR} \
  --meta_path "./shell/data/mix.json" \
  --freeze_llm False \
  --bf16 True \
  --num_train_epochs 1 \
  --per_device_train_batch_size ${PER_DEVICE_BATCH_SIZE} \
  --gradient_accumulation_steps ${GRADIENT_ACC} \
  --learning_rate 4e-5 \
  --deepspeed "zero_stage1_config.json" \
  --report_to "tensorboard" \
  2>&1 | tee -a "${OUTPUT_DIR}/training_log.txt"
