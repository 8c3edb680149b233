#!/bin/bash
case "$1" in
    pretrain)
        deepspeed teal/train/train.py \
            --deepspeed zero2.json \
            --tune_mm_mlp_adapter True \
            --learning_rate 1e-3 \
            --output_dir out/teal-pretrain
        ;;
    finetune|ft)
        deepspeed teal/train/train.py \
            --deepspeed zero3.json \
            --pretrain_mm_mlp_adapter out/teal-pretrain/mm_projector.bin \
            --learning_rate 2e-5 \
            --output_dir out/teal-finetune
        ;;
    *)
        echo "usage: $0 pretrain|finetune" >&2
        exit 2
        ;;
esac
