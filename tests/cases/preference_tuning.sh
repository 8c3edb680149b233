torchrun --nproc_per_node 8 owl/train/train_dpo.py \
    --model_name_or_path checkpoints/owl-7b \
    --beta 0.1 \
    --learning_rate 5e-7 \
    --num_train_epochs 1 \
    --fsdp "full_shard auto_wrap" \
    --fsdp_transformer_layer_cls_to_wrap 'OwlDecoderLayer' \
    --output_dir checkpoints/owl-7b-dpo
