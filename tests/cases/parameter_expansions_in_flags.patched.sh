NAME=models/my-base
deepspeed train.py \
    --deepspeed ${DS:-z.json} \
    --model ${NAME} \
    --run_name ${NAME##*/}-${NAME//\//_} \
    --learning_rate "${LR:-"1e-5"}" \
    --note "${NOTE:-a } brace}" \
    --length ${#NAME} \
    --output_dir ${OUT:=out} \
    --lora_enable True \
    --lora_r 16 \
    --lora_alpha 32 \
    --lora_dropout 0.1 \
    --lora_bias none
