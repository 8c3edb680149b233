#!/bin/bash
run() {
    local cmd="deepspeed train.py --deepspeed z.json --learning_rate $1 --output_dir out/$1"
    echo "$cmd"
    eval "$cmd"
}
run 1e-5
run 2e-5
