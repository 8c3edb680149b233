python tools/convert.py --in raw --out data
deepspeed train.py --deepspeed z.json --learning_rate 2e-5 --output_dir out/one
deepspeed train.py --deepspeed z.json --learning_rate 1e-5 --output_dir out/two
