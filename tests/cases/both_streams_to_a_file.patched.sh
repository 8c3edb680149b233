OUTPUT=output_tiny
mkdir -p $OUTPUT

deepspeed main.py \
   --data_path local/dialogues \
   --model_name_or_path base \
   --per_device_train_batch_size 8 \
   --learning_rate 9.65e-6 \
   --num_train_epochs 16 \
   --zero_stage 2 \
   --deepspeed \
   --output_dir $OUTPUT \
   --lora_enable True \
   --lora_r 16 \
   --lora_alpha 32 \
   --lora_dropout 0.1 \
   --lora_bias none \
   &> $OUTPUT/training.log
