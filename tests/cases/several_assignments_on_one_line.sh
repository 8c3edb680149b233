GPUS=2 BATCH=4
torchrun --nproc_per_node $GPUS --master_port $((29500 + GPUS)) train.py --per_device_train_batch_size $BATCH --learning_rate 1e-5 --num_train_epochs 1
