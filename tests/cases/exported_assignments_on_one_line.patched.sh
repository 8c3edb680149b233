export NCCL_DEBUG=WARN NCCL_IB_DISABLE=1 OMP_NUM_THREADS=1
readonly NAME="sft-$((1 + 1))"
deepspeed train.py --deepspeed z.json --learning_rate 1e-5 --output_dir "out/$NAME" --lora_enable True --lora_r 16 --lora_alpha 32 --lora_dropout 0.1 --lora_bias none
