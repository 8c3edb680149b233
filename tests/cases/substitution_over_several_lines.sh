torchrun --master_port $(
    # any free port
    echo 29513 \
        | cat
) train.py \
    --learning_rate 1e-5 \
    --num_train_epochs 1 \
    --output_dir out
