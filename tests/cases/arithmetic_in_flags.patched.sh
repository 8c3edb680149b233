GPUS=2
BATCH=4
torchrun --nproc_per_node $GPUS --master_port $((29500 + 11)) train.py \
    --gradient_accumulation_steps $(( 128 / (BATCH * GPUS) )) \
    --learning_rate 1e-5 \
    --num_train_epochs 1 \
    --max_pixels "$((1280*28*28))" \
    --block_size $((1<<10)) \
    --lora_enable True \
    --lora_r 16 \
    --lora_alpha 32 \
    --lora_dropout 0.1 \
    --lora_bias none
