#!/usr/bin/env bash
set -Eeuo pipefail
shopt -s nullglob extglob
declare -A SIZE=([tiny]=1 [small]=4)
declare -a GPUS=(0 1)
IFS=',' read -r -a PARTS <<< "tiny,small"
[[ ${PARTS[0]} =~ ^t(in|on)y$ ]] && echo "match ${BASH_REMATCH[1]}"
(( ${#GPUS[@]} > 1 )) && PORT=$(( 29500 + ${#GPUS[@]} ))
for name in "${!SIZE[@]}"; do [[ $name == @(tiny) ]] || continue
  while read -r line; do : "$line"; done < <(printf '%s\n' a b)
  deepspeed --master_port "${PORT:-29500}" train.py \
    --deepspeed z.json \
    --per_device_train_batch_size "${SIZE[$name]}" \
    --learning_rate 1e-5 \
    --output_dir "out/${name^^}"
done
