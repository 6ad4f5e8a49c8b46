"""What lies on disk: config.json, weights, packed folders, artefacts, tokenizer and templates."""
