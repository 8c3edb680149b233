python train.py --lora_r=8 --lora_alpha=8 --learning_rate=1e-4 --num_train_epochs=1
