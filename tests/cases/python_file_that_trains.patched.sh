LR=2e-2
LEN=128

CUDA_VISIBLE_DEVICES=0 python3 main.py \
    --do_train \
    --train_file adverts/train.json \
    --validation_file adverts/dev.json \
    --prompt_column content \
    --overwrite_cache \
    --model_name_or_path base-6b \
    --output_dir output/adverts-6b-$LEN-$LR \
    --max_target_length 64 \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 16 \
    --max_steps 3000 \
    --save_steps 1000 \
    --learning_rate $LR \
    --lora_enable True \
    --lora_r 16 \
    --lora_alpha 32 \
    --lora_dropout 0.1 \
    --lora_bias none
