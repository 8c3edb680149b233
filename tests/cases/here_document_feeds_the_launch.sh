accelerate launch train.py --learning_rate 1e-5 --num_train_epochs 1 --output_dir out <<EOF
yes
--lora_r 99 is only text here
EOF
echo ok
