NAME=models/my-base
deepspeed train.py \
    --deepspeed ${DS:-z.json} \
    --model ${NAME} \
    --run_name ${NAME##*/}-${NAME//\//_} \
    --learning_rate "${LR:-"1e-5"}" \
    --note "${NOTE:-a } brace}" \
    --length ${#NAME} \
    --output_dir ${OUT:=out}
