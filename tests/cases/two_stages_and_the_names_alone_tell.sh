torchrun --nproc_per_node 4 vlm/pretrain.py --learning_rate 1e-4 --num_train_epochs 1 --output_dir out/stage1_pretrain
torchrun --nproc_per_node 4 vlm/finetune.py --learning_rate 1e-5 --num_train_epochs 1 --output_dir out/stage2_finetune
