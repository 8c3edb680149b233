ZERO=2
deepspeed train.py \
    --deepspeed '{"zero_optimization": {"stage": 2}, "train_batch_size": "auto"}' \
    --model_kwargs "{\"attn\": \"sdpa\", \"layers\": [1, 2]}" \
    --extra '{"stage": '"$ZERO"'}' \
    --learning_rate 1e-5 \
    --output_dir out \
    --lr_scheduler_kwargs '{"num_cycles": 1}'
