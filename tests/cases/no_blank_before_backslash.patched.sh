torchrun --nproc_per_node=8 src/train.py\
    --config configs/base.yaml\
    --learning_rate 1e-5\
    --max_steps 2000\
    --output_dir out\
    --lora_enable True\
    --lora_r 16\
    --lora_alpha 32\
    --lora_dropout 0.1\
    --lora_bias none
