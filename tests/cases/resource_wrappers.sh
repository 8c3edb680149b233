timeout -k 5 12h nice -n 10 stdbuf -oL python train.py --learning_rate 1e-5 --num_train_epochs 1 --output_dir out >> train.log 2>&1
