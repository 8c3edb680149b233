torchrun train.py \
  --learning_rate 1e-4 \
  --num_train_epochs 1 \
  --lora_r=16 \
  --output_dir out \
  --lora_enable True \
  --lora_alpha 32 \
  --lora_dropout 0.1 \
  --lora_bias none
