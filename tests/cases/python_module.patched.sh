python -m plover.train --learning_rate 1e-5 --num_train_epochs 1 --per_device_train_batch_size 4 --lora_enable True --lora_r 16 --lora_alpha 32 --lora_dropout 0.1 --lora_bias none
