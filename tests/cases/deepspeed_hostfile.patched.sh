ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
deepspeed --hostfile="${ROOT}/hosts" --num_nodes 2 --num_gpus 8 --no_ssh_check \
    --launcher pdsh --master_addr node0 \
    "$ROOT/train/train_mem.py" \
    --deepspeed "$ROOT/z.json" \
    --learning_rate 1e-5 \
    --output_dir "$ROOT/out" \
    --lora_enable True \
    --lora_r 16 \
    --lora_alpha 32 \
    --lora_dropout 0.1 \
    --lora_bias none
