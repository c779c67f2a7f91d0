"""Quality of a plan: KL divergence, delta NLL and retrieval accuracy against the full cache."""
