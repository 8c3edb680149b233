OPTS="--deepspeed z.json --learning_rate 1e-5 --output_dir out"
deepspeed train.py $OPTS
