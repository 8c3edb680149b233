deepspeed train.py \
    --deepspeed z.json \
    --prompt "one \
        --lora_r two \
        three" \
    --learning_rate 1e-5 \
    --lora_enable True \
    --lora_r 16 \
    --lora_alpha 32 \
    --lora_dropout 0.1 \
    --lora_bias none
