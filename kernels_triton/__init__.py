"""The ops of `pyfastlora.ops` as Triton kernels, one file per op, under the same stems."""
