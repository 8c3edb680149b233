cmd="deepspeed train.py --deepspeed z.json --learning_rate 1e-5 --run_name \"a b\""
eval "$cmd"
