CMD="torchrun --nproc_per_node 2 train.py --learning_rate 1e-5 --num_train_epochs 1 --output_dir out"
$CMD 2>&1 | tee log
