function finetune {
	local lr=$1 name=${2:-plain}
	torchrun --nproc_per_node 2 train.py \
		--learning_rate $lr \
		--num_train_epochs 1 \
		--output_dir "out/$name"
}
finetune 1e-5 one
finetune 2e-5
