#!/bin/bash
set -u
run_all() {
    local seed
    if [ -n "${1:-}" ]; then
        for seed in 1 2; do
            deepspeed lark/train.py \
                --deepspeed zero2.json \
                --data_path "$1" \
                --seed $seed \
                --learning_rate 2e-5 \
                --output_dir "out/seed$seed"
        done
    fi
}
run_all data/chat.json
