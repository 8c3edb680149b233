python tools/train.py --learning_rate 1e-5 --num_train_epochs 2 --batch_size 4 configs/bird.yaml
