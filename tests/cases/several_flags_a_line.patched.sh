deepspeed --num_gpus 4 sft/train.py \
    --model_name_or_path base --train_file a.jsonl --output_dir out \
    --bf16 True --tf32 True --gradient_checkpointing True \
    --learning_rate 1e-5 --num_train_epochs 2 --warmup_ratio 0.03 \
    --lora_enable True \
    --lora_r 16 \
    --lora_alpha 32 \
    --lora_dropout 0.1 \
    --lora_bias none
