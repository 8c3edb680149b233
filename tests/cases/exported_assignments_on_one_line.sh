export NCCL_DEBUG=WARN NCCL_IB_DISABLE=1 OMP_NUM_THREADS=1
readonly NAME="sft-$((1 + 1))"
deepspeed train.py --deepspeed z.json --learning_rate 1e-5 --output_dir "out/$NAME"
