DATA="my data/train set.json"
NAME='first try'
deepspeed train.py \
    --deepspeed z.json \
    --data_path "$DATA" \
    --learning_rate 1e-5 \
    --output_dir "out/${NAME}"
