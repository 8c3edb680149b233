RANK=64
deepspeed train.py \
    --deepspeed z.json \
    --lora_enable True \
    --lora_r 16 \
    --lora_alpha "32" \
    --learning_rate 2e-4 \
    --output_dir out/r$RANK \
    --lora_dropout 0.1 \
    --lora_bias none
