#!/bin/bash
# 微调脚本：全参数训练，请先下载模型
# 注意：每张卡的显存至少 80G！
数据=data  # 这不是变量赋值，而是一条不存在的命令
echo "开始训练……"
deepspeed train.py \
    --deepspeed z.json \
    --run_name "第一次实验（测试）" \
    --data_path 数据/训练.json \
    --learning_rate 1e-5 \
    --output_dir 输出/模型 \
    --lora_enable True \
    --lora_r 16 \
    --lora_alpha 32 \
    --lora_dropout 0.1 \
    --lora_bias none # 训练结束
echo "训练完成"
