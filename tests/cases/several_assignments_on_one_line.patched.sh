GPUS=2 BATCH=4
torchrun --nproc_per_node $GPUS --master_port $((29500 + GPUS)) train.py --per_device_train_batch_size $BATCH --learning_rate 1e-5 --num_train_epochs 1 --lora_enable True --lora_r 16 --lora_alpha 32 --lora_dropout 0.1 --lora_bias none
