deepspeed train.py --deepspeed z.json --learning_rate 1e-5 --run_name exp#7 --output_dir out#1
