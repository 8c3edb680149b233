COMMON="--deepspeed z.json --bf16 True --version plain"
deepspeed train.py $COMMON --tune_mm_mlp_adapter True --learning_rate 1e-3 --output_dir out/pretrain
deepspeed train.py $COMMON --pretrain_mm_mlp_adapter out/pretrain/mm_projector.bin --learning_rate 2e-5 --output_dir out/finetune
