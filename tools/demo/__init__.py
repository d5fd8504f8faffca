"""The demo's base models, built without a download. The demo's data is written by `tools/make_sample/`."""
