deepspeed train.py --deepspeed z.json --tune_mm_mlp_adapter True --learning_rate 1e-3 --output_dir out/pretrain
deepspeed train.py --deepspeed z.json --learning_rate 2e-5 --output_dir out/finetune-general
deepspeed train.py --deepspeed z.json --learning_rate 1e-5 --output_dir out/finetune-medical --lora_enable True --lora_r 16 --lora_alpha 32 --lora_dropout 0.1 --lora_bias none
