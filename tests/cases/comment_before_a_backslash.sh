deepspeed train.py \
    --deepspeed z.json \
    --learning_rate 1e-5 # small \
    --output_dir out
