"""λ of all candidates: in closed form or in the graph, summed over the batches of a pass."""
