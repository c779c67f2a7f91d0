"""What a plan costs: KL divergence, NLL and retrieval accuracy against the full cache."""
