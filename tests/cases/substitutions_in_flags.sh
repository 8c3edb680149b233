torchrun --nproc_per_node $(nvidia-smi -L | wc -l) train.py \
    --data_path "$(cd "$(dirname "$0")" && printf '%s' "data/a)b.json")" \
    --learning_rate 1e-5 \
    --num_train_epochs 1 \
    --run_name "run-$(echo "x $(echo ')')" && echo y)" \
    --output_dir out/$(date +%Y%m%d)
