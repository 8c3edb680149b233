deepspeed train.py --deepspeed z.json --learning_rate 2e-4 --lora_r 16 --lora_enable True --lora_alpha 32 --lora_dropout 0.1 --lora_bias none 2>&1 | tee log
