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
                --output_dir "out/seed$seed" \
                --lora_enable True \
                --lora_r 16 \
                --lora_alpha 32 \
                --lora_dropout 0.1 \
                --lora_bias none
        done
    fi
}
run_all data/chat.json
