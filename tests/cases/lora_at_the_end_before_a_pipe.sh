deepspeed train.py --deepspeed z.json --learning_rate 2e-4 --lora_r 4 2>&1 | tee log
