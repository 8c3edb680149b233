#!/bin/bash
#SBATCH --nodes=2
export MASTER_ADDR=node0
export SLURM_PROCID=0
srun --jobid=1 bash -c 'torchrun --nnodes 2 --nproc_per_node 8 --node_rank $SLURM_PROCID --master_addr $MASTER_ADDR train.py \
    --learning_rate 1e-5 \
    --num_train_epochs 1 \
    --output_dir out \
    --lora_enable True \
    --lora_r 16 \
    --lora_alpha 32 \
    --lora_dropout 0.1 \
    --lora_bias none'
