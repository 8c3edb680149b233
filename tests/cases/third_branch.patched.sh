#!/bin/bash
STAGE=$1
if [ "$STAGE" = "data" ]; then
    python tools/convert.py --input raw --output data
elif [ "$STAGE" = "align" ]; then
    deepspeed lark/train.py --deepspeed z2.json --tune_mm_mlp_adapter True --learning_rate 1e-3 --output_dir out/pretrain
elif [ "$STAGE" = "sft" ]; then
    deepspeed lark/train.py --deepspeed z3.json --pretrain_mm_mlp_adapter out/pretrain/mm_projector.bin --learning_rate 2e-5 --output_dir out/finetune --lora_enable True --lora_r 16 --lora_alpha 32 --lora_dropout 0.1 --lora_bias none
else
    echo "unknown stage $STAGE"
fi
