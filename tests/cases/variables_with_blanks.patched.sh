DATA="my data/train set.json"
NAME='first try'
deepspeed train.py \
    --deepspeed z.json \
    --data_path "$DATA" \
    --learning_rate 1e-5 \
    --output_dir "out/${NAME}" \
    --lora_enable True \
    --lora_r 16 \
    --lora_alpha 32 \
    --lora_dropout 0.1 \
    --lora_bias none
