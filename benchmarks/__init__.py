"""What the figures of the README come from. Run each script by its path: python benchmarks/convert.py"""
