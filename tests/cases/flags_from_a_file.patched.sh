printf -- '--deepspeed z.json --learning_rate 1e-5' > flags.txt
deepspeed train/train_mem.py $(cat flags.txt) --num_train_epochs 1 --lora_enable True --lora_r 16 --lora_alpha 32 --lora_dropout 0.1 --lora_bias none
