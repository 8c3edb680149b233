deepspeed --num_gpus `nproc` train.py --deepspeed z.json --learning_rate 1e-5 --output_dir `echo out` --tag "`echo \`echo inner\` tail`"
