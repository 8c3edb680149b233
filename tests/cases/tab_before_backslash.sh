deepspeed tools/sft.py	\
  --train_file data/a.json	\
  --learning_rate 1e-5	\
  --num_train_epochs 2	\
  --output_dir out
echo finished
