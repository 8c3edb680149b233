nohup deepspeed --include localhost:2,3 train.py --deepspeed z2.json --learning_rate 1e-5 --output_dir out --lora_enable True --lora_r 16 --lora_alpha 32 --lora_dropout 0.1 --lora_bias none > train.log 2>&1 &
echo "running in the background"
