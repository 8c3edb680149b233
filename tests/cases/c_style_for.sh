for ((i = 0; i < 2; i++)); do
    torchrun --nproc_per_node 2 train.py --seed $i --learning_rate 1e-5 --num_train_epochs 1 --output_dir out/$i
done
