#!/bin/bash
DATA=data/blip.json
bash scripts/pretrain.sh "$DATA"
./scripts/finetune.sh "$DATA"
