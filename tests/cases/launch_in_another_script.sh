#!/bin/bash
export GPUS=8
bash scripts/finetune.sh $GPUS
