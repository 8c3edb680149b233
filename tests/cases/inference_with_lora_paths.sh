python scripts/merge_lora_weights.py --model-path checkpoints/finetune-lora --model-base base --save-model-path merged
python -m rail.serve.cli --model-path checkpoints/rail-lora --image-file a.jpg --load-4bit
