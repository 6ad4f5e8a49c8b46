"""The GPU half of the runtime: arena, weights, the decode step as a CUDA graph, prefill, cold neurons."""
