"""How quire-tiny, the bundled model, is made: data, tokenizer, training, evaluation."""
