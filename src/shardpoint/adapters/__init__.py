"""What touches torch: process groups, state dictionaries, tensors; everything below this floor works without it."""
