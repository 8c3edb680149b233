OPTS="--deepspeed z.json --lora_enable True --lora_r 128 --lora_alpha 256 --learning_rate 2e-4"
deepspeed train.py $OPTS --output_dir out
