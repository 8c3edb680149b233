( deepspeed train.py --deepspeed z.json --learning_rate 1e-5 --output_dir out 2>&1 | tee log.txt ) &
wait
