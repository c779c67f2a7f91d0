"""Text: the built-in corpus, documents with needles for calibration and retrieval accuracy, prompt files."""
