python -m torch.distributed.launch --nproc_per_node=4 --use_env main.py \
    --lr 1e-4 \
    --epochs 30 \
    --batch-size 16 \
    --gradient_accumulation_steps 2 \
    --output out
