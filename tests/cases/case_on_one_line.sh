case $1 in ft) deepspeed train.py --deepspeed z.json --learning_rate 1e-5 --output_dir out ;; *) echo "usage: $0 ft" ;; esac
