exec 3>&1
deepspeed train.py --deepspeed z.json --learning_rate 1e-5 --seed 1 1>out.log 2>&3 3>&-
