deepspeed --num_gpus 2 inference/generate.py --name base --batch_size 4 --dtype float16 --max_new_tokens 128 --ds_inference
