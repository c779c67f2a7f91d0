"""Other people's tools: EleutherAI's lm-evaluation-harness."""
