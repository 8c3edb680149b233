nohup deepspeed --include localhost:2,3 train.py --deepspeed z2.json --learning_rate 1e-5 --output_dir out > train.log 2>&1 &
echo "running in the background"
