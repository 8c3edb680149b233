deepspeed train.py --deepspeed z.json --learning_rate 1e-5 --sep $'\n\t' --stop $'it\'s over' --title $"a title"
