"""Tasks that a model is judged by: data sets, prompts, scoring, a sandbox for generated code."""
