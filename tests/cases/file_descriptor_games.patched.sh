exec 3>&1
deepspeed train.py --deepspeed z.json --learning_rate 1e-5 --seed 1 --lora_enable True --lora_r 16 --lora_alpha 32 --lora_dropout 0.1 --lora_bias none 1>out.log 2>&3 3>&-
