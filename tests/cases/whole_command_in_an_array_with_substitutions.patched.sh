PYTHON=python
CMD=($PYTHON train.py
    --run_name "$(echo "a b")"
    --data_path $(cd . && echo data)
    --learning_rate 1e-5
    --num_train_epochs 1
    --lora_enable True
    --lora_r 16
    --lora_alpha 32
    --lora_dropout 0.1
    --lora_bias none)
"${CMD[@]}"
