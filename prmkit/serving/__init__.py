"""The judge over HTTP: many clients, one model."""
