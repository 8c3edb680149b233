deepspeed train.py --deepspeed z.json --learning_rate 1e-5 --data my\ data/set\ 1.json --eos \<\/s\> --output_dir out\ dir
