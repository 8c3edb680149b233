deepspeed train.py \
    --deepspeed z.json \
    --prompt "a; b | c > d && e & f" \
    --template '<|user|> {q} <|end|> # no comment' \
    --learning_rate 1e-5 \
    --output_dir out # a real comment with "quotes' and | pipes
