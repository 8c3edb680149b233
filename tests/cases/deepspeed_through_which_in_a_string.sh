CMD="python $(which deepspeed) train/train_mem.py \
    --deepspeed z.json \
    --learning_rate 1e-5 \
    --output_dir out"
$CMD 2>&1 | tee log
