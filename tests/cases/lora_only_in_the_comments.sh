# for LoRA add: --lora_enable True --lora_r 64
#    --lora_alpha 16 \
deepspeed train.py --deepspeed z.json --learning_rate 1e-5 --output_dir out
