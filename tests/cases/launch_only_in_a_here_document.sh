#!/bin/bash
sbatch <<EOF
#!/bin/bash
#SBATCH --gres=gpu:1
srun python train.py --learning_rate 1e-5 --num_train_epochs 1
EOF
