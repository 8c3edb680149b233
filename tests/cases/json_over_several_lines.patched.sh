deepspeed train.py \
  --learning_rate 1e-5 \
  --output_dir out \
  --deepspeed '{
        "fp16": {"enabled": true},
        --lora_r 99
        "zero_optimization": {
            "stage": 2
        }
    }' \
  --lora_enable True \
  --lora_r 16 \
  --lora_alpha 32 \
  --lora_dropout 0.1 \
  --lora_bias none
