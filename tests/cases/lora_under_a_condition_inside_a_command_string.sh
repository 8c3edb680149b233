#!/bin/bash
if [ "$USE_LORA" = 1 ]; then
    LORA="--lora_enable True --lora_r 64"
else
    LORA=""
fi
CMD="deepspeed train.py \
    --learning_rate 1e-5 \
    --output_dir out \
    $LORA $EXTRA"
echo $CMD
$CMD
