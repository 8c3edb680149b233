deepspeed train.py --deepspeed z.json --tune_mm_mlp_adapter True --learning_rate 1e-3 --output_dir out/a
deepspeed train.py --deepspeed z.json --tune_mm_mlp_adapter False --learning_rate 2e-5 --output_dir out/b
