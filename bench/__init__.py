"""What the library costs and gains, measured: `python -m bench.adapter_tax`, `bench.ops`, `bench.report`.

Needs the checkout and the `bench` extra; nothing here is part of the installed package.
"""
