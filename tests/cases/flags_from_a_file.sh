printf -- '--deepspeed z.json --learning_rate 1e-5' > flags.txt
deepspeed train/train_mem.py $(cat flags.txt) --num_train_epochs 1
