"""Output parsers: reasoning and tool calls found in generated text."""
