torchrun --nproc_per_node=auto -m plover.train --learning_rate 1e-5 --num_train_epochs 1 --output_dir out
