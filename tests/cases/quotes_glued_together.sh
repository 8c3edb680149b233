W="x y"
deepspeed train.py --deepspeed z.json --learning_rate 1e-5 --prompt 'It'"'"'s '"$W"-plain\ end
