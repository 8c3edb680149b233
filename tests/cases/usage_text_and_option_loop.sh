#!/bin/bash
export CUDA_DEVICE_MAX_CONNECTIONS=1
DIR=`pwd`
MODEL="base"
DS_CONFIG="z2.json"

function usage() {
    cat <<USAGE
usage: bash finetune.sh [-m MODEL] [--deepspeed FILE]
which then runs
  torchrun finetune.py --learning_rate 1e-5 --output_dir out
USAGE
}

while [[ "$1" != "" ]]; do
    case $1 in
        -m | --model )
            shift
            MODEL=$1
            ;;
        --deepspeed )
            shift; DS_CONFIG=$1
            ;;
        -h | --help )
            usage; exit 0
            ;;
        * )
            echo "unknown ${1}"; exit 1
            ;;
    esac
    shift
done

DISTRIBUTED_ARGS="
    --nproc_per_node 2
    --nnodes 1
    --master_port 6001
"

torchrun $DISTRIBUTED_ARGS finetune.py \
    --model_name_or_path "$MODEL" \
    --data_path "$DIR/data.json" \
    --bf16 True \
    --output_dir out \
    --num_train_epochs 5 \
    --per_device_train_batch_size 1 \
    --learning_rate 1e-5 \
    --deepspeed ${DS_CONFIG}
