deepspeed train.py \
    --deepspeed z.json \
    --use_lora False \
    --lora_rank 8 \
    --lora_r_min 2 \
    --q_lora False \
    --learning_rate 1e-5 \
    --output_dir out
