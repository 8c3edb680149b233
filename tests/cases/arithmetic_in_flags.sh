GPUS=2
BATCH=4
torchrun --nproc_per_node $GPUS --master_port $((29500 + 11)) train.py \
    --gradient_accumulation_steps $(( 128 / (BATCH * GPUS) )) \
    --learning_rate 1e-5 \
    --num_train_epochs 1 \
    --max_pixels "$((1280*28*28))" \
    --block_size $((1<<10))
