"""The fp4 operators on the CPU: C++ kernels, built on the user's machine when the first one runs."""
