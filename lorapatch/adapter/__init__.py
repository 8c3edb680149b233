"""What a training left: the adapter's files, looked at."""
