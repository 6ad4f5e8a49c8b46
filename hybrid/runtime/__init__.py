"""What answers: the engine, its decode step on the CPU, sampling, and the choice of device and placement."""
