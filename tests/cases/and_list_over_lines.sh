mkdir -p work && cd work &&
deepspeed ../src/train.py \
    --deepspeed ../z3.json \
    --learning_rate 1e-5 \
    --output_dir out &&
cd ..
