#!/bin/bash
export MODEL=base
mkdir -p out
wget -q https://example.org/data.zip
bash eval/textvqa.sh $MODEL 0
nvidia-smi
