"""Many small networks of one architecture trained as one batched program."""
