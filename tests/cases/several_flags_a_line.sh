deepspeed --num_gpus 4 sft/train.py \
    --model_name_or_path base --train_file a.jsonl --output_dir out \
    --bf16 True --tf32 True --gradient_checkpointing True \
    --learning_rate 1e-5 --num_train_epochs 2 --warmup_ratio 0.03
