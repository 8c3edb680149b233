deepspeed egret/train.py \
  --deepspeed zero2.json \
  --model_name_or_path base \
  --data_path data.json \
  --bf16 True --tf32 True \
  --output_dir out \
  --num_train_epochs 1 \
  --save_steps 500 --save_total_limit 1 \
  --learning_rate 2e-5
