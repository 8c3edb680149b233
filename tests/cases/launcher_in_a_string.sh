LAUNCHER="torchrun --nproc_per_node 4 --master_port 29511"
$LAUNCHER train.py \
    --learning_rate 1e-5 \
    --num_train_epochs 1 \
    --output_dir out
