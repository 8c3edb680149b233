deepspeed train.py --deepspeed z.json --lora_enable False --lora_r 8 --tune_mm_mlp_adapter True --learning_rate 1e-3 --output_dir out/pretrain
deepspeed train.py --deepspeed z.json --lora_enable False --lora_r 8 --learning_rate 2e-5 --output_dir out/finetune
