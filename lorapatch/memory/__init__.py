"""What a run will need: parameters, bytes, peak."""
