deepspeed wren/train.py \
    --deepspeed zero3.json \
    --learning_rate 2e-5 \
    --output_dir out/wren \
    --report_to none \
    --lora_enable True \
    --lora_r 16 \
    --lora_alpha 32 \
    --lora_dropout 0.1 \
    --lora_bias none \
    # --max_steps 100

echo "done"
