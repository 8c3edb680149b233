"""The embedded MGM trainer: started by deepspeed, torchrun or python, it imports nothing else of lorapatch."""
