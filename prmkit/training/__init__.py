"""The training package: configuration, preflight, launch, records, export."""
