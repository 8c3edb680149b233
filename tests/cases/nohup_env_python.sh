nohup env CUDA_VISIBLE_DEVICES=3 python -u src/train_lm.py --learning_rate 5e-5 --num_train_epochs 2 --output_dir out > nohup.log 2>&1 &
