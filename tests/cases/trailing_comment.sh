deepspeed wren/train.py \
    --deepspeed zero2.json \
    --learning_rate 2e-5 \
    --output_dir out/wren \
    --report_to none # the log goes nowhere
