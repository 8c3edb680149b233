#!/bin/bash
deepspeed train.py --learning_rate 1e-5 --lora_r 8 config.yaml
