deepspeed train.py --deepspeed z.json --lora_r 8 --learning_rate 2e-4 --output_dir out --lora_enable True --lora_alpha 16 --lora_dropout 0.1 --lora_bias none
