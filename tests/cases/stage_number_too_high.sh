deepspeed train.py --deepspeed z.json --learning_rate 1e-5 --output_dir out/finetune
python -m rail.eval.model_vqa --model-path out/finetune --answers-file a.jsonl
