deepspeed train.py --deepspeed z.json --learning_rate 1e-5 --note "compare with --lora_r 64 later" --output_dir out
