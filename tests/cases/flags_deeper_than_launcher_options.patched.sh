accelerate launch \
    --multi_gpu \
    --num_processes 4 \
    --mixed_precision bf16 \
    swift_vlm/train/train.py \
        --model_name_or_path base \
        --data_path data/mix.json \
        --learning_rate 1e-5 \
        --num_train_epochs 1 \
        --output_dir out/mix \
        --lora_enable True \
        --lora_r 16 \
        --lora_alpha 32 \
        --lora_dropout 0.1 \
        --lora_bias none
