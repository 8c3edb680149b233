#!/bin/bash
################################################################################
#                                                                              #
#   visual instruction tuning, all weights, one node                           #
#                                                                              #
################################################################################
set -e

EXPERIMENT=kestrel-3b-sft-v4
BASE=ckpts/kestrel-3b
PROJECTOR=ckpts/kestrel-3b-align/mm_projector.bin
DATA=data/instruct_v4.json
IMAGES=data/images
GPUS=8

mkdir -p runs/$EXPERIMENT

deepspeed --num_gpus $GPUS --master_port 29601 kestrel/train/train_mem.py \
    --deepspeed scripts/zero3_offload.json \
    --model_name_or_path $BASE \
    --version kestrel_chat \
    --data_path $DATA \
    --image_folder $IMAGES \
    --is_multimodal True \
    --vision_tower ckpts/siglip-384 \
    --vision_tower_lr 2e-6 \
    --unfreeze_vision_tower False \
    --pretrain_mm_mlp_adapter $PROJECTOR \
    --mm_projector_type mlp2x_gelu \
    --mm_vision_select_layer -2 \
    --mm_vision_select_feature patch \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --mm_patch_merge_type spatial_unpad \
    --image_aspect_ratio anyres \
    --image_grid_pinpoints "[(384, 768), (768, 384), (768, 768)]" \
    --group_by_modality_length True \
    --freeze_backbone False \
    --bf16 True \
    --fp16 False \
    --tf32 True \
    --output_dir runs/$EXPERIMENT \
    --overwrite_output_dir False \
    --run_name $EXPERIMENT-finetune \
    --seed 42 \
    --data_seed 7 \
    --num_train_epochs 1 \
    --max_steps -1 \
    --per_device_train_batch_size 4 \
    --per_device_eval_batch_size 4 \
    --gradient_accumulation_steps 4 \
    --eval_accumulation_steps 1 \
    --evaluation_strategy "no" \
    --save_strategy "steps" \
    --save_steps 2000 \
    --save_total_limit 2 \
    --save_safetensors True \
    --learning_rate 1e-5 \
    --mm_projector_lr 1e-5 \
    --weight_decay 0. \
    --adam_beta1 0.9 \
    --adam_beta2 0.98 \
    --adam_epsilon 1e-8 \
    --max_grad_norm 1.0 \
    --warmup_ratio 0.03 \
    --lr_scheduler_type "cosine" \
    --logging_steps 1 \
    --logging_first_step True \
    --log_level info \
    --disable_tqdm False \
    --model_max_length 4096 \
    --gradient_checkpointing True \
    --dataloader_num_workers 8 \
    --dataloader_pin_memory True \
    --dataloader_drop_last True \
    --lazy_preprocess True \
    --remove_unused_columns False \
    --torch_compile False \
    --ddp_timeout 7200 \
    --report_to wandb \
    --lora_enable True \
    --lora_r 16 \
    --lora_alpha 32 \
    --lora_dropout 0.1 \
    --lora_bias none

################################################################################
echo "checkpoints: runs/$EXPERIMENT"
