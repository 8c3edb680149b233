LOGS=logs; mkdir -p $LOGS
run_cmd="deepspeed main.py --deepspeed --learning_rate 1e-5 --num_train_epochs 2 2>&1 | tee ${LOGS}/main.log"
echo "${run_cmd}"
eval "${run_cmd}"
