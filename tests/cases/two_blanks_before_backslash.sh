deepspeed main.py  \
   --data_path local/jsonfile  \
   --model_name_or_path facebook/tiny  \
   --per_device_train_batch_size 8  \
   --learning_rate 9.65e-6  \
   --num_train_epochs 4  \
   --output_dir ./output
