RANK=64
deepspeed train.py \
    --deepspeed z.json \
    --lora_enable True \
    --lora_r $RANK \
    --lora_alpha "${ALPHA:-16}" \
    --learning_rate 2e-4 \
    --output_dir out/r$RANK
