"""Which neurons live where: byte-exact VRAM plan, cost model, solvers and the placement itself."""
