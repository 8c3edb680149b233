torchrun --nproc_per_node=2 wren/train.py \
    --learning_rate 2e-5 \
    --num_train_epochs 1 \
    --output_dir out/wren \