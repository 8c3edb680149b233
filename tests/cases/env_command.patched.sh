export DEBUG=1
env -u DEBUG CUDA_VISIBLE_DEVICES=0,1 "RUN_NAME=a b" deepspeed train.py \
    --deepspeed z.json \
    --learning_rate 1e-5 \
    --output_dir out \
    --lora_enable True \
    --lora_r 16 \
    --lora_alpha 32 \
    --lora_dropout 0.1 \
    --lora_bias none
