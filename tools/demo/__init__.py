"""The demo's base models, built without a download. `tools/make_sample/` writes the demo's data."""
