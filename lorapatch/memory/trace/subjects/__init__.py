"""The models that are traced, each with its batch and its loss, as their trainers have them."""
