LOG=logs/sft
mkdir -p $LOG
deepspeed train/train.py \
    --deepspeed zero2.json \
    --learning_rate 2e-5 \
    --output_dir out \
    --report_to none \
    2>&1 | tee $LOG/train.log
