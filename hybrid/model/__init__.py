"""The model: its weights as the placement lays them out, FFN strategies, products and KV cache."""
