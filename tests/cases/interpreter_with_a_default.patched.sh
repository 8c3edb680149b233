"${PYTHON:-python}" "$(dirname "$0")"/tools/finetune.py --learning_rate 1e-5 --num_train_epochs 3 --output_dir out --lora_enable True --lora_r 16 --lora_alpha 32 --lora_dropout 0.1 --lora_bias none
