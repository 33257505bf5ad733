"""Back end: what an fp4 operator is, its exact reference, and the kernels that compute it."""
