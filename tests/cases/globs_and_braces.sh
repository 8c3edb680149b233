torchrun --nproc_per_node 2 train.py --learning_rate 1e-5 --num_train_epochs 1 --shards data/part-*.json --layers {0..3} --freeze {vision,text}_tower
