ARGS=(--lora_dropout=0.05 --learning_rate 1e-5 --num_train_epochs 1)
torchrun train.py "${ARGS[@]}" --seed 1
