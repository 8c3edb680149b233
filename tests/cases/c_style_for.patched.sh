for ((i = 0; i < 2; i++)); do
    torchrun --nproc_per_node 2 train.py --seed $i --learning_rate 1e-5 --num_train_epochs 1 --output_dir out/$i --lora_enable True --lora_r 16 --lora_alpha 32 --lora_dropout 0.1 --lora_bias none
done
