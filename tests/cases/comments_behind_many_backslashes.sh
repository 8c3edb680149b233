#!/bin/bash
deepspeed train.py \  # the trainer
    --deepspeed z.json \        # offload
    --learning_rate 1e-5 \      # 学习率
    --output_dir out            # 输出
