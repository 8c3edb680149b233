python data/preprocess_images.py --input raw --output data --batch_size 64 --num_workers 8
python3 tools/dedup.py --input data --threshold 0.9
