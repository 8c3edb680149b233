OPTS="--lora_r=16 --lora_dropout=0.1 --learning_rate 1e-5 --num_train_epochs 1"
torchrun train.py $OPTS --output_dir out --seed 1 --lora_enable True --lora_alpha 32 --lora_bias none
