deepspeed --bind_cores_to_rank --enable_each_rank_log logs/ranks train.py --deepspeed z.json --learning_rate 1e-5 --output_dir out
