torchrun --nproc_per_node 4 train.py --learning_rate 1e-5 --num_train_epochs 1 --output_dir out \
    2>&1 | tee train.log
