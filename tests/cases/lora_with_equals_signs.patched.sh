python train.py --lora_r=16 --lora_alpha=32 --learning_rate=1e-4 --num_train_epochs=1 --lora_enable=True --lora_dropout=0.1 --lora_bias=none
