"""Observers and training behaviour for any LightningModule."""
