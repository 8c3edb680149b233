#!/bin/bash
# 🚀🚀 launch 👩‍🔬 (four-byte characters)
echo "🔥 start"; deepspeed train.py --deepspeed z.json --run_name "🦙-é" --learning_rate 1e-5 --output_dir out && echo "✅ done"
