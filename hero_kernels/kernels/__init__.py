"""The Triton kernels, a file an operation: mathematics, kernel, launcher of the twin's signature.

Imported only where a kernel is about to run: importing ``hero_kernels`` needs no Triton.
"""
