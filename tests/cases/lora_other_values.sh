deepspeed train.py \
    --lora_bias lora_only \
    --lora_alpha 16 \
    --deepspeed z.json \
    --lora_dropout 0.05 \
    --lora_r 64 \
    --learning_rate 2e-4 \
    --lora_enable False \
    --output_dir out
