#!/usr/bin/env bash
NPROC=${NPROC:-2}
LAUNCHER=(
    python -m torch.distributed.run
    --nproc_per_node="${NPROC}"
    -m plover.train.sft
)
"${LAUNCHER[@]}" \
    --deepspeed z2.json \
    --learning_rate 1e-5 \
    --output_dir out \
    --lora_enable True \
    --lora_r 16 \
    --lora_alpha 32 \
    --lora_dropout 0.1 \
    --lora_bias none
