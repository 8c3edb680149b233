RANK=16
ALPHA="32"
deepspeed train.py --deepspeed z.json --learning_rate 2e-4 --lora_enable True --lora_r $RANK --lora_alpha ${ALPHA} --lora_dropout 0.1 --lora_bias none
