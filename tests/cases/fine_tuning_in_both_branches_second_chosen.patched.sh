if [ "$SIZE" = 7b ]; then
    deepspeed train.py --deepspeed z3.json --learning_rate 2e-5 --output_dir out/finetune-7b
else
    deepspeed train.py --deepspeed z2.json --learning_rate 4e-5 --output_dir out/finetune-2b --lora_enable True --lora_r 16 --lora_alpha 32 --lora_dropout 0.1 --lora_bias none
fi
