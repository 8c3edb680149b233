PYTHON=python
CMD=($PYTHON train.py
    --run_name "$(echo "a b")"
    --data_path $(cd . && echo data)
    --learning_rate 1e-5
    --num_train_epochs 1)
"${CMD[@]}"
