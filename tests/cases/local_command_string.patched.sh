#!/bin/bash
run() {
    local cmd="deepspeed train.py --deepspeed z.json --learning_rate $1 --output_dir out/$1 --lora_enable True --lora_r 16 --lora_alpha 32 --lora_dropout 0.1 --lora_bias none"
    echo "$cmd"
    eval "$cmd"
}
run 1e-5
run 2e-5
