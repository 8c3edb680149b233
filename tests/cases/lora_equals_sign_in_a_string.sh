OPTS="--lora_r=64 --lora_dropout=0.05 --learning_rate 1e-5 --num_train_epochs 1"
torchrun train.py $OPTS --output_dir out --seed 1
