deepspeed --include "localhost:${GPU_IDS:-0,1}" --module plover.alignment.finetune \
  --deepspeed z.json \
  --learning_rate 1e-5 \
  --output_dir out/finetune
