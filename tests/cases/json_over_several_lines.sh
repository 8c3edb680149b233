deepspeed train.py \
  --learning_rate 1e-5 \
  --output_dir out \
  --deepspeed '{
        "fp16": {"enabled": true},
        --lora_r 99
        "zero_optimization": {
            "stage": 2
        }
    }'
