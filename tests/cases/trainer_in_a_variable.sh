TRAINER=src/train_vlm.py
deepspeed $TRAINER --deepspeed z.json --learning_rate 1e-5 --output_dir out
