if [ "$SIZE" = 7b ]; then
    deepspeed train.py --deepspeed z3.json --learning_rate 2e-5 --output_dir out/finetune-7b
else
    deepspeed train.py --deepspeed z2.json --learning_rate 4e-5 --output_dir out/finetune-2b
fi
