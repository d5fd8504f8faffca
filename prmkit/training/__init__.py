"""The training wing: configuration, preflight, launch, records, export."""
