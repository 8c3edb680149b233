echo deepspeed train.py --deepspeed z.json --learning_rate 1e-5
echo "python train.py --learning_rate 1 --num_train_epochs 1"
deepspeed train.py --deepspeed z.json --learning_rate 1e-5
