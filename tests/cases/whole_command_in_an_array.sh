#!/bin/bash
CMD=(deepspeed --num_gpus 2 train.py
    --deepspeed z.json
    --learning_rate 1e-5
    --run_name "first run"
    --output_dir out
)
echo "${CMD[*]}"
"${CMD[@]}" 2>&1 | tee log
