if true; then
    deepspeed train.py --deepspeed z.json --learning_rate 1e-5 --output_dir out
