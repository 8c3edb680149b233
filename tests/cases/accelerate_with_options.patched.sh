accelerate launch --config_file conf/z3.yaml --num_processes 8 --main_process_port 29501 --multi_gpu src/train_sft.py \
    --model_name_or_path base \
    --learning_rate 1e-5 \
    --num_train_epochs 1 \
    --output_dir out \
    --lora_enable True \
    --lora_r 16 \
    --lora_alpha 32 \
    --lora_dropout 0.1 \
    --lora_bias none
