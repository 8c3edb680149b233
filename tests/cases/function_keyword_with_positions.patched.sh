function finetune {
	local lr=$1 name=${2:-plain}
	torchrun --nproc_per_node 2 train.py \
		--learning_rate $lr \
		--num_train_epochs 1 \
		--output_dir "out/$name" \
		--lora_enable True \
		--lora_r 16 \
		--lora_alpha 32 \
		--lora_dropout 0.1 \
		--lora_bias none
}
finetune 1e-5 one
finetune 2e-5
