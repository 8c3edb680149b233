deepspeed train.py \
    --deepspeed z.json \
    --prompt "one \
        --lora_r two \
        three" \
    --learning_rate 1e-5
