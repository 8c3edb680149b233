accelerate launch \
    --multi_gpu \
    --num_processes 4 \
    --mixed_precision bf16 \
    swift_vlm/train/train.py \
        --model_name_or_path base \
        --data_path data/mix.json \
        --learning_rate 1e-5 \
        --num_train_epochs 1 \
        --output_dir out/mix
