"""Tune until it fits and learns: as few and as short runs as possible."""
