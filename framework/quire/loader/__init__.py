"""From a checkpoint on disk or on the Hugging Face hub to a model in memory."""
