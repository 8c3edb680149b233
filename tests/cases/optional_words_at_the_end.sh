torchrun train.py \
    --learning_rate 1e-5 \
    --num_train_epochs 1 \
    --output_dir out \
    ${DEBUG:+--max_steps "5"}
