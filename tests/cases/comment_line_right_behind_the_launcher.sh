deepspeed train.py \
# data and model
    --deepspeed z.json \
    --learning_rate 1e-5
