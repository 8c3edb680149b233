LAUNCHER="torchrun --nproc_per_node 2"
CMD=(${LAUNCHER} train.py --learning_rate 1e-5 --num_train_epochs 1)
"${CMD[@]}"
