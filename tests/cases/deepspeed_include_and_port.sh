PORT=$((12000 + 345))
deepspeed --include localhost:0,1 --master_port=$PORT bittern/train.py \
    --deepspeed z.json \
    --learning_rate 1e-5 \
    --output_dir out
