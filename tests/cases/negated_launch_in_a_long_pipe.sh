! python -u train.py --learning_rate 1e-5 --num_train_epochs 1 --output_dir out 2>/dev/null \
    | tr '\r' '\n' | tee log |
    cat -n &
