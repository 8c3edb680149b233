python train.py 2>err.log --learning_rate 1e-5 --num_train_epochs 2 --output_dir out >out.log
