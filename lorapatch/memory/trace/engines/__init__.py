"""What stands between the model and the optimizer, with its buffers: plain torch, ZeRO-1 and 2, ZeRO-3."""
