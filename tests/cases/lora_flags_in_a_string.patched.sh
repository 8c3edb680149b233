OPTS="--deepspeed z.json --lora_enable True --lora_r 16 --lora_alpha 32 --learning_rate 2e-4"
deepspeed train.py $OPTS --output_dir out --lora_dropout 0.1 --lora_bias none
