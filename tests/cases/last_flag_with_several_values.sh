torchrun --nproc_per_node 4 sft.py \
  --learning_rate 1e-5 \
  --num_train_epochs 1 \
  --output_dir out \
  --datasets chat \
             code \
             math
