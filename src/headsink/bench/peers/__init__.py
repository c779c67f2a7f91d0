"""Other engines measured side by side: llama.cpp and vLLM."""
