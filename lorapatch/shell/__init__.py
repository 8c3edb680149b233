"""What a shell script says: its commands, words and bytes. Knows nothing of training."""
