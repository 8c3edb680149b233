deepspeed train.py \
    --deepspeed z.json \
    --lora_enable \
    --lora_r 8 \
    --learning_rate 2e-4 \
    --output_dir out
