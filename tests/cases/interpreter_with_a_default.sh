"${PYTHON:-python}" "$(dirname "$0")"/tools/finetune.py --learning_rate 1e-5 --num_train_epochs 3 --output_dir out
