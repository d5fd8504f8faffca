"""Where the README's numbers come from. Run each script by its path: python benchmarks/convert.py"""
