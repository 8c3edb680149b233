torchrun --nproc_per_node 4 sft.py \
  --model base \
  --learning_rate 1e-5 \
  --num_train_epochs 1 \
  --do_train \
  --bf16
