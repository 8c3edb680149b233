printf 'chat\ncode\n' > sets.txt
while read -r name; do
    python train.py --learning_rate 1e-5 --num_train_epochs 1 --data "data/$name.json" --output_dir "out/$name" --lora_enable True --lora_r 16 --lora_alpha 32 --lora_dropout 0.1 --lora_bias none < /dev/null
done < sets.txt
