"""The ladders that come with lorapatch, as data."""
