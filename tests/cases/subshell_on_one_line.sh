(cd . && torchrun train.py --learning_rate 1e-5 --max_steps 5 --output_dir out)
