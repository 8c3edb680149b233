if true; then torchrun train.py --learning_rate 1e-5 --max_steps 10 --output_dir out; fi
