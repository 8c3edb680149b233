deepspeed train.py \
    --lora_enable True \
    --lora_r 16 --lora_alpha 32 --lora_dropout 0.1 --lora_bias none \
    --deepspeed z.json \
    --learning_rate 2e-4 \
    --output_dir out/lora
