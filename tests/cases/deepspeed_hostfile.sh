ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
deepspeed --hostfile="${ROOT}/hosts" --num_nodes 2 --num_gpus 8 --no_ssh_check \
    --launcher pdsh --master_addr node0 \
    "$ROOT/train/train_mem.py" \
    --deepspeed "$ROOT/z.json" \
    --learning_rate 1e-5 \
    --output_dir "$ROOT/out"
