deepspeed train.py "--deepspeed" z.json "--lora_r" "64" '--learning_rate' 2e-4 --output_dir out
