deepspeed train.py \
    --lora_bias none \
    --lora_alpha 32 \
    --deepspeed z.json \
    --lora_dropout 0.1 \
    --lora_r 16 \
    --learning_rate 2e-4 \
    --lora_enable True \
    --output_dir out
