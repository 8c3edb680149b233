mkdir -p logs
deepspeed train/train.py \
    --deepspeed zero2.json \
    --learning_rate 2e-5 \
    --output_dir out \
    --report_to none 2>&1 | tee logs/train.log
