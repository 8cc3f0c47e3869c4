"""The Triton kernels, one file per operation and named after it: kernels, then the function that launches
them.

Imported only when a kernel is about to run: importing ``hero_kernels`` does not need Triton. Launchers take
the arguments of their operation by keyword, checked and complete (:mod:`hero_kernels.ops` documents them).
"""
