python3 -m torch.distributed.run --nproc_per_node 8 --node_rank=0 -m plover.train \
  --learning_rate 1e-5 \
  --num_train_epochs 1 \
  --output_dir out
