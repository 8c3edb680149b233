CMD="deepspeed train.py --deepspeed z.json"
CMD="$CMD --learning_rate 1e-5"
CMD="${CMD} --output_dir out"
eval $CMD
