deepspeed wren/train.py \
    --deepspeed zero3.json \
    --learning_rate 2e-5 \
    --output_dir out/wren \
    --report_to none \
    # --max_steps 100

echo "done"
