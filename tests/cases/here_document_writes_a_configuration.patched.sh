#!/bin/bash
STAGE=2
cat <<EOF > ds.json
{
  "train_batch_size": "auto",
  "zero_optimization": {"stage": ${STAGE}, "note": "$(echo "it's")"}
}
EOF

deepspeed train.py \
    --deepspeed ds.json \
    --learning_rate 1e-5 \
    --output_dir out \
    --lora_enable True \
    --lora_r 16 \
    --lora_alpha 32 \
    --lora_dropout 0.1 \
    --lora_bias none

cat <<'DONE'
  all done; costs $5
  deepspeed is not run here \
DONE
