python finetune.py --learning_rate 1e-4 --num_train_epochs 3 --output_dir out  # about two hours
