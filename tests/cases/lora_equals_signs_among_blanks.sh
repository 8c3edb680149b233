torchrun train.py \
  --learning_rate 1e-4 \
  --num_train_epochs 1 \
  --lora_r=8 \
  --output_dir out
