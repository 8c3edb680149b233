export DEBUG=1
env -u DEBUG CUDA_VISIBLE_DEVICES=0,1 "RUN_NAME=a b" deepspeed train.py \
    --deepspeed z.json \
    --learning_rate 1e-5 \
    --output_dir out
