python -m plover.train --learning_rate 1e-5 --num_train_epochs 1 --per_device_train_batch_size 4
