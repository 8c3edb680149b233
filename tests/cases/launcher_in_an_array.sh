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
    --output_dir out
