#!/bin/bash
#SBATCH -N 2
#SBATCH --exclusive

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=29505

srun --jobid 77 -n 2 torchrun \
    --nnodes 2 \
    --nproc_per_node 8 \
    --rdzv_id 100 --rdzv_backend c10d \
    --rdzv_endpoint $head_node:$MASTER_PORT \
    train.py \
    --learning_rate 1e-5 \
    --num_train_epochs 1 \
    --output_dir out \
    --lora_enable True \
    --lora_r 16 \
    --lora_alpha 32 \
    --lora_dropout 0.1 \
    --lora_bias none
