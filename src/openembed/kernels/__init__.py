"""Our own CPU kernels: linear layers with 8-bit or float32 weights, norms and packed attention, in C for AVX-512."""
