accelerate launch --config_file conf/z3.yaml --num_processes 8 --main_process_port 29501 --multi_gpu src/train_sft.py \
    --model_name_or_path base \
    --learning_rate 1e-5 \
    --num_train_epochs 1 \
    --output_dir out
