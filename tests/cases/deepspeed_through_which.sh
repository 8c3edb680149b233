#!/bin/bash
SCRIPT_DIR=$(cd "$(dirname "$0")" && pwd)
PYTHONPATH=$SCRIPT_DIR/training DS_BUILD_OPS=0 /opt/conda/envs/mgm/bin/python $(which deepspeed) $SCRIPT_DIR/training/mgm/train/train_mem.py \
    --deepspeed $SCRIPT_DIR/training/scripts/zero2_offload.json \
    --pretrain_mm_mlp_adapter out/pretrain/mm_projector.bin \
    --learning_rate 2e-5 \
    --output_dir out/finetuning \
    2>&1 | tee finetuning.log
