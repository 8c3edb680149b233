deepspeed train.py \
    --deepspeed z.json \
    --learning_rate 1e-5 \
    --max_steps -1 \
    --mm_vision_select_layer -2
