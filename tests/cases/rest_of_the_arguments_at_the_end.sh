accelerate launch --num_processes 2 train.py --learning_rate "$1" --num_train_epochs 1 --output_dir out "${@:2}"
