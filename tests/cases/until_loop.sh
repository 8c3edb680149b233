tries=0
until torchrun train.py --learning_rate 1e-5 --num_train_epochs 1 --output_dir out || [ $tries -ge 3 ]; do
    tries=$((tries + 1)); sleep 1
done
