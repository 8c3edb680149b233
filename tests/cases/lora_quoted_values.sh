deepspeed train.py \
    --deepspeed z.json \
    --lora_enable "True" \
    --lora_r "64" \
    --lora_alpha '16' \
    --lora_dropout "0.05" \
    --lora_bias 'none' \
    --learning_rate 2e-4 \
    --output_dir out
