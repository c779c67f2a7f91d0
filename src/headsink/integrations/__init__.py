"""Integrations with other tools: EleutherAI's lm-evaluation-harness."""
