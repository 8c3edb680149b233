deepspeed train.py \
    --deepspeed z.json \
    --lora_enable \
    --lora_r 16 \
    --learning_rate 2e-4 \
    --output_dir out \
    --lora_alpha 32 \
    --lora_dropout 0.1 \
    --lora_bias none
